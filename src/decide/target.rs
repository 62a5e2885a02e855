//! Where a request goes by its own account: path and query after transforms, what a route makes of them for the origin, and
//! the same address over TLS.

use http::HeaderValue;
use smallvec::SmallVec;

use crate::client::address::ClientAddress;
use crate::request::{Facts, host_name};
use crate::routes::Route;
use crate::rules::View;
use crate::rules::view::{Asker, Target};
use crate::snapshot::Snapshot;
use crate::transforms::Rewritten;

/// The path and query after every transform that applies, and which these are; each sees what those before
/// it made.
pub fn rewritten<'a>(
    snapshot: &Snapshot,
    facts: &Facts<'a>,
    asker: Asker<'_>,
    mut target: Target<'a>,
) -> (Target<'a>, SmallVec<[u16; 4]>) {
    let mut applied = SmallVec::new();
    for nth in 0..snapshot.transforms.transforms.len() {
        let view = View::new(facts, &target, asker);
        if let Some(Rewritten { path, query }) = snapshot.transforms.rewrite(nth, &view) {
            target.rewrite(path, query);
            applied.push(u16::try_from(nth).unwrap_or(u16::MAX));
        }
    }
    (target, applied)
}

/// What a route makes of path and query for the origin, if it rewrites them.
pub(super) fn own_target(route: &Route, view: &View<'_>, target: &Target<'_>) -> Option<String> {
    let rewrite = route.rewrite.as_ref()?;
    let (Rewritten { path, query }, mut own) = (rewrite.transform.target(view), target.clone());
    rewrite.strip_prefix.iter().for_each(|prefix| own.strip(prefix));
    own.rewrite(path, query);
    own.to_origin()
}

/// Did the client come over TLS, to us or to a proxy that we trust?
pub(super) fn over_tls(facts: &Facts<'_>, client: &ClientAddress) -> bool {
    facts.tls
        || (client.trusted_peer && facts.header("x-forwarded-proto").is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")))
}

/// Where a request is at home over TLS.
pub(super) fn secured(facts: &Facts<'_>, port: u16) -> Option<HeaderValue> {
    if facts.host.is_empty() || !facts.path.starts_with('/') {
        return None;
    }
    let port = if port == 443 { String::new() } else { format!(":{port}") };
    let query = facts.query.map(|query| format!("?{query}")).unwrap_or_default();
    HeaderValue::try_from(format!("https://{}{port}{}{query}", host_name(facts.host), facts.path)).ok()
}
