//! Everything that needs real sockets.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where it cannot go on"
)]

mod acme;
mod cache;
mod cache_races;
mod challenge;
mod cluster;
mod connections;
mod dashboards;
mod explained;
mod failover;
mod files;
mod grpc;
mod harness;
mod health;
mod identity;
mod limits;
mod lists;
mod mmdb;
mod names;
mod orders;
mod overload;
mod page;
mod process;
mod real_servers;
mod regions;
mod reload;
mod replay;
mod seeing;
mod streaming;
mod tls;
mod tracing;
mod transforms;
mod upgrade;
mod waf;
