//! A request as rules see it, from its JSON.

use portolan::client::place::Databases;
use portolan::client::standing::Standing;
use portolan::explain::{Asked, Question};
use portolan::lists::Lists;
use portolan::request::Moment;
use portolan::rules::View;
use portolan::rules::view::{Asker, Target};

/// Calls `ask` with the request; where it tells no address and URL, a client of 192.0.2.1 asks for `url`.
pub fn with_view<R>(mut request: serde_json::Map<String, serde_json::Value>, url: &str, ask: impl FnOnce(&View<'_>) -> R) -> R {
    request.entry("ip").or_insert("192.0.2.1".into());
    request.entry("url").or_insert(url.into());
    let question: Question = serde_json::from_value(request.into()).unwrap();
    let asked = Asked::new(&question).unwrap();
    let facts = asked.facts(question.ip, 64 << 10);
    let (databases, lists, standing) = (Databases::default(), Lists::default(), Standing::default());
    let place = databases.lookup(question.ip);
    let (ip, now) = (question.ip, Moment::default());
    let asker = Asker { ip, trusted_peer: false, place: &place, databases: &databases, lists: &lists, standing: &standing, now };
    let target = Target::new(&facts);
    ask(&View::new(&facts, &target, asker))
}
