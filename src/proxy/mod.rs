//! The only folder that knows Pingora: sockets, hooks, peers. No policy lives here.

mod answer;
mod body;
mod caching;
pub mod clock;
mod door;
mod edge;
mod facts;
mod failing;
mod files;
mod headers;
pub mod introduced;
mod journey;
pub mod listen;
mod patient;
mod peer;
pub mod probe;
mod queue;
pub mod server;
mod shaper;
pub mod store;
mod stream;
mod tunnel;

pub use edge::Edge;
pub use peer::check_identity;
