//! Work in the background: I/O that no request waits for.

pub mod acme;
pub mod bans;
pub mod certificates;
pub mod cluster;
pub mod dns;
pub mod orders;
pub mod otlp;
pub mod probe;
pub mod seconds;
pub mod signals;
pub mod upgrade;
pub mod watch;
