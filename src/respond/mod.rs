//! What the client sees when Portolan itself answers, and which headers pass.

pub mod headers;
mod refusal;

pub use refusal::Refusal;
