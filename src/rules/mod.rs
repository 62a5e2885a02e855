//! The rule language: Cloudflare's expressions, compiled.
//!
//! ```text
//!  text ─► syntax ─► tree ─► check (types, lists, patterns, folding) ─► program ─► run against a View
//!          error: span, reason, hint                                              fields, values, functions
//! ```
//!
//! A [`Filter`] is an expression that says yes or no, a [`Template`] one that gives a text. Both are compiled
//! once and run without recursion deeper than [`Limits::depth`]; a field is computed when a rule asks for it,
//! once per request, and kept in the [`View`].

pub mod body;
mod check;
pub mod error;
pub mod fields;
mod functions;
pub mod normalise;
mod pattern;
mod program;
mod syntax;
pub mod trace;
mod tree;
mod value;
pub mod view;

pub use check::{Filter, Scalar, Scope, Template, Uses};
pub use error::ExprError;
pub use fields::Phase;
pub use pattern::Regex;
pub use view::View;

/// Bounds of one expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of its text; Cloudflare's bound.
    pub length: usize,
    /// Levels of nesting.
    pub depth: usize,
    /// Bytes of a regular expression once compiled.
    pub regex: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { length: 4096, depth: 64, regex: 10 << 20 }
    }
}
