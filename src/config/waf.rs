//! What may pass.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Name, Size, Span};

/// The web application firewall.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Waf {
    /// `log`: no rule stops anything, whatever its own mode; all say what they would have done.
    #[serde(default)]
    pub mode: Mode,
    /// How much of a request's body rules see, at most 1MiB; what is longer is cut for them, and passes whole.
    #[serde(default = "default_body_limit")]
    pub body_limit: Size,
    /// Rules, in order.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// The ruleset that comes with Portolan.
    #[serde(default)]
    pub managed: Managed,
    /// How challenges are made.
    #[serde(default)]
    pub challenge: Challenge,
}

impl Default for Waf {
    fn default() -> Self {
        Self {
            mode: Mode::Block,
            body_limit: default_body_limit(),
            rules: Vec::new(),
            managed: Managed::default(),
            challenge: Challenge::default(),
        }
    }
}

fn default_body_limit() -> Size {
    Size(64 << 10)
}

/// Whether a rule acts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It does what it says.
    #[default]
    Block,
    /// It only says so.
    Log,
}

/// One rule.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its name in logs, metrics and explanations.
    pub id: Name,
    /// When it applies, in Cloudflare's language.
    pub expression: String,
    /// What it does then.
    pub action: Action,
    /// `log`: it only says what it would have done.
    #[serde(default)]
    pub mode: Mode,
    /// For `block`: what the client gets.
    #[serde(default)]
    pub response: Option<Response>,
    /// For `skip`: what is left out. `rest`, `limits`, `managed`, or a category of the managed ruleset.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub skip: Option<Vec<Skip>>,
    /// For `redirect`: where to.
    #[serde(default)]
    pub redirect: Option<Redirection>,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Refuses the request: 403.
    Block,
    /// A computation that the browser does; without JavaScript a short wait.
    Challenge,
    /// A computation that the browser does.
    JsChallenge,
    /// A short wait for those with a low threat score, a computation for others.
    ManagedChallenge,
    /// Counts and logs the match.
    Log,
    /// Leaves out rules that follow.
    Skip,
    /// Sends the client elsewhere.
    Redirect,
}

/// What `skip` leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Skip {
    /// The rules that follow under `waf.rules`.
    Rest,
    /// Every one of `limits`.
    Limits,
    /// The managed ruleset.
    Managed,
    /// Its rules against paths that leave their folder.
    Traversal,
    /// Its rules against code and commands.
    Rce,
    /// Its rules against template injection.
    Ssti,
    /// Its rules against Log4Shell.
    Log4shell,
    /// Its rules against scanners.
    Scanner,
    /// Its rules against SQL injection.
    Sqli,
    /// Its rules against cross-site scripting.
    Xss,
    /// Its rules against requests to inner addresses.
    Ssrf,
    /// Its rules against header injection.
    Protocol,
    /// Its rules against uploads of programs.
    Upload,
    /// Its rules against external XML entities.
    Xxe,
    /// Its rules against NoSQL injection.
    Nosql,
}

/// What a blocked client gets.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Response {
    /// The status.
    #[serde(default = "default_status")]
    #[schemars(range(min = 400, max = 599))]
    pub status: u16,
    /// `Content-Type` of the body.
    #[serde(default = "default_content_type")]
    pub content_type: String,
    /// The body.
    #[serde(default)]
    pub body: String,
}

fn default_status() -> u16 {
    403
}

pub(super) fn default_content_type() -> String {
    "text/plain; charset=utf-8".to_owned()
}

/// Where a client is sent.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Redirection {
    /// The address: a text, or an expression that gives one.
    pub to: Text,
    /// The status.
    #[serde(default)]
    pub status: RedirectStatus,
    /// Append the request's query.
    #[serde(default)]
    pub preserve_query: bool,
}

/// Statuses that send a client elsewhere (RFC 9110, section 15.4).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u16")]
pub struct RedirectStatus(pub Redirect);

/// One of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Redirect {
    /// 301: for good.
    MovedPermanently,
    /// 302: for now.
    #[default]
    Found,
    /// 303: to something else.
    SeeOther,
    /// 307: for now, with the same method.
    Temporary,
    /// 308: for good, with the same method.
    Permanent,
}

impl RedirectStatus {
    /// As a number.
    pub fn code(self) -> u16 {
        match self.0 {
            Redirect::MovedPermanently => 301,
            Redirect::Found => 302,
            Redirect::SeeOther => 303,
            Redirect::Temporary => 307,
            Redirect::Permanent => 308,
        }
    }
}

impl TryFrom<u16> for RedirectStatus {
    type Error = String;
    fn try_from(code: u16) -> Result<Self, String> {
        let all = [Redirect::MovedPermanently, Redirect::Found, Redirect::SeeOther, Redirect::Temporary, Redirect::Permanent];
        let found = all.into_iter().map(Self).find(|s| s.code() == code);
        found.ok_or_else(|| "expected 301, 302, 303, 307 or 308".to_owned())
    }
}

impl JsonSchema for RedirectStatus {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "redirect-status".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "integer", "format": "redirect-status", "enum": [301, 302, 303, 307, 308] })
    }
}

/// A text, or an expression that gives one.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Text {
    /// Always the same.
    Fixed(String),
    /// Made for each request.
    Dynamic(Dynamic),
}

/// An expression that gives a text.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dynamic {
    /// The expression.
    pub expression: String,
}

/// The ruleset that comes with Portolan.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Managed {
    /// Off by default.
    #[serde(default)]
    pub enabled: bool,
    /// Does it refuse, or only say so?
    #[serde(default)]
    pub mode: Mode,
    /// How much it takes for an attack.
    #[serde(default)]
    pub sensitivity: Sensitivity,
    /// Rules of it that are left out, by their ids.
    #[serde(default)]
    pub except: Vec<Name>,
}

/// How much is taken for an attack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sensitivity {
    /// What is hardly ever anything else.
    #[default]
    Low,
    /// What is rarely anything else.
    Medium,
    /// What might be one.
    High,
}

/// How challenges are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Challenge {
    /// Zero bits that the browser's hash has to begin with: each more doubles the work. 16 takes a laptop about 0.1 s.
    #[serde(default = "default_difficulty")]
    #[schemars(range(min = 1, max = 24))]
    pub difficulty: u8,
    /// How long a browser that passed is not asked again.
    #[serde(default = "default_clearance")]
    pub clearance: Span,
}

impl Default for Challenge {
    fn default() -> Self {
        Self { difficulty: default_difficulty(), clearance: default_clearance() }
    }
}

fn default_difficulty() -> u8 {
    16
}

fn default_clearance() -> Span {
    Span(Duration::from_secs(1_800))
}
