//! Everything that needs real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod explained;
mod failover;
mod harness;
mod identity;
mod mmdb;
mod process;
mod real_servers;
mod reload;
mod streaming;
