//! The only folder that knows Pingora: sockets, hooks, peers. No policy lives here.

pub mod clock;
mod edge;
mod facts;
pub mod listen;
mod patient;
mod peer;
pub mod server;
mod stream;

pub use edge::Edge;
