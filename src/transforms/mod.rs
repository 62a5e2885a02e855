//! What is rewritten on the way, and who is sent elsewhere.

use http::{HeaderName, HeaderValue};

use crate::rules::{Filter, Template, View};

/// Redirects and transforms, in the order of the file.
#[derive(Debug, Default)]
pub struct Transforms {
    /// Clients that are sent elsewhere.
    pub redirects: Box<[Redirect]>,
    /// What is rewritten.
    pub transforms: Box<[Transform]>,
}

/// Sends clients elsewhere.
#[derive(Debug)]
pub struct Redirect {
    /// When; always if there is none.
    pub filter: Option<Filter>,
    /// Where to.
    pub location: Location,
}

/// Where a client is sent, and how.
#[derive(Debug)]
pub struct Location {
    /// The address.
    pub to: Template,
    /// The status.
    pub status: u16,
    /// Append the request's query.
    pub preserve_query: bool,
}

/// Rewrites.
#[derive(Debug, Default)]
pub struct Transform {
    /// When; always if there is none.
    pub filter: Option<Filter>,
    /// It is about responses alone, and asked once there is one; else it is asked before the route is chosen.
    pub after: bool,
    /// The new path.
    pub path: Option<Template>,
    /// The new query.
    pub query: Option<Template>,
    /// Headers for the origin.
    pub request: Edits,
    /// Headers for the client.
    pub response: Edits,
}

/// What one route rewrites, once it was chosen.
#[derive(Debug)]
pub struct Rewrite {
    /// The origin does not see this beginning of the path.
    pub strip_prefix: Option<Box<str>>,
    /// The rest.
    pub transform: Transform,
}

/// Changes of headers, values still to be made.
#[derive(Debug, Default)]
pub struct Edits {
    /// Set.
    pub set: Box<[(HeaderName, Template)]>,
    /// Removed.
    pub remove: Box<[HeaderName]>,
}

/// What became of path and query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewritten {
    /// The new path.
    pub path: Option<String>,
    /// The new query.
    pub query: Option<String>,
}

/// One change of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It has this value, whatever was there.
    Set(HeaderName, HeaderValue),
    /// It is not there.
    Remove(HeaderName),
}

impl Change {
    /// Of which header.
    pub fn name(&self) -> &HeaderName {
        match self {
            Self::Set(name, _) | Self::Remove(name) => name,
        }
    }

    /// Its new value, if it has one.
    pub fn value(&self) -> Option<&HeaderValue> {
        match self {
            Self::Set(_, value) => Some(value),
            Self::Remove(_) => None,
        }
    }
}

/// Headers that no transform may touch: they frame messages, or say what only Portolan may.
pub fn is_fixed(name: &HeaderName) -> bool {
    const FIXED: [&str; 15] = [
        "cache-status",
        "connection",
        "content-length",
        "date",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "proxy-status",
        "set-cookie",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    ];
    FIXED.contains(&name.as_str()) || ["portolan-", "portolan_"].iter().any(|own| name.as_str().starts_with(own))
}

impl Edits {
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }

    /// Appends what has to be changed.
    pub fn changes(&self, view: &View<'_>, to: &mut Vec<Change>) {
        to.extend(self.remove.iter().cloned().map(Change::Remove));
        for (name, template) in &self.set {
            // Without a value there is no header, whatever the other side sent.
            let value = template.render(view).and_then(|text| HeaderValue::from_bytes(&text).ok());
            to.push(value.map_or(Change::Remove(name.clone()), |value| Change::Set(name.clone(), value)));
        }
    }
}

impl Location {
    /// The address for this request; nothing if a part of it is missing.
    pub fn render(&self, view: &View<'_>) -> Option<HeaderValue> {
        let mut to = escaped(&self.to.render(view)?, b"");
        if self.preserve_query && !view.target.query.is_empty() {
            to.push(if to.contains('?') { '&' } else { '?' });
            to.push_str(&escaped(view.target.query.as_bytes(), b""));
        }
        HeaderValue::from_str(&to).ok()
    }
}

impl Transforms {
    /// Where the client is sent, with its status.
    pub fn redirect(&self, view: &View<'_>) -> Option<(u16, HeaderValue)> {
        let matching = self.redirects.iter().filter(|r| r.filter.as_ref().is_none_or(|f| f.matches(view)));
        matching.filter_map(|r| Some((r.location.status, r.location.render(view)?))).next()
    }

    /// Does one transform apply to this request, and what does it make of path and query?
    pub fn rewrite(&self, nth: usize, view: &View<'_>) -> Option<Rewritten> {
        self.transforms.get(nth).filter(|t| !t.after && t.applies(view)).map(|transform| transform.target(view))
    }

    /// Changes of the headers that the origin gets, by the transforms that `applied`.
    pub fn request(&self, view: &View<'_>, applied: &[u16]) -> Vec<Change> {
        let mut changes = Vec::new();
        let applied = applied.iter().filter_map(|nth| self.transforms.get(usize::from(*nth)));
        applied.for_each(|t| t.request.changes(view, &mut changes));
        changes
    }

    /// Does any of them change headers that the client gets?
    pub fn edits_responses(&self) -> bool {
        self.transforms.iter().any(|t| !t.response.is_empty())
    }

    /// Changes of the headers that the client gets, by the transforms that `applied` and those about responses.
    pub fn response(&self, view: &View<'_>, applied: &[u16]) -> Vec<Change> {
        let mut changes = Vec::new();
        for (nth, transform) in self.transforms.iter().enumerate() {
            let applies = match transform.after {
                true => transform.applies(view),
                false => applied.iter().any(|a| usize::from(*a) == nth),
            };
            if applies {
                transform.response.changes(view, &mut changes);
            }
        }
        changes
    }
}

impl Transform {
    fn applies(&self, view: &View<'_>) -> bool {
        self.filter.as_ref().is_none_or(|f| f.matches(view))
    }

    /// What it makes of path and query, if it applies.
    pub fn target(&self, view: &View<'_>) -> Rewritten {
        let path = self.path.as_ref().and_then(|p| p.render(view)).map(|path| {
            let path = escaped(&path, b"?#");
            if path.starts_with('/') { path } else { format!("/{path}") }
        });
        let query = self.query.as_ref().and_then(|q| q.render(view));
        let query = query.map(|query| escaped(query.strip_prefix(b"?").unwrap_or(&query), b"#"));
        Rewritten { path, query }
    }
}

/// As a part of a URI: what cannot stand in one is percent-encoded (RFC 3986, section 2.1), and `also`.
fn escaped(text: &[u8], also: &[u8]) -> String {
    let mut safe = String::with_capacity(text.len());
    for byte in text {
        match byte {
            b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' => safe.push_str(&format!("%{byte:02X}")),
            _ if byte.is_ascii_graphic() && !also.contains(byte) => safe.push(char::from(*byte)),
            _ => safe.push_str(&format!("%{byte:02X}")),
        }
    }
    safe
}
