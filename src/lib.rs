//! Portolan: a self-hosted edge that puts people before the right regional backend, keeps them served
//! when regions fail, and says why it did what it did.
//!
//! The modules below stand in the order in which a request travels:
//!
//! ```text
//!              config ──► snapshot                       (made whole before any request sees it)
//!                            │
//!  client ─► proxy ─► decide ┴► client ► transforms ► routes ► overload ► waf ► limits ► regions ► upstream ─► proxy ─► origin
//!   ▲          │                                                                                    ▲          │
//!   └─ respond ◄───────────── observe ◄── state ◄───────────────────────────────────────────────────┴──────────┘
//! ```
//!
//! `decide` and everything it calls take values and return values; sockets are `proxy`'s, the work in
//! the background is `tasks`', and `reload` swaps one snapshot for the next. What a reload must not lose is in
//! `memory` (for decisions) and `state` (for the rest); what operators order for regions is in `orders`.

pub mod config;
pub mod snapshot;

pub mod lists;

pub mod cache;
pub mod client;
pub mod connections;
pub mod decide;
pub mod explain;
pub mod kept;
pub mod limits;
pub mod listeners;
pub mod memory;
pub mod observe;
pub mod overload;
pub mod regions;
pub mod request;
pub mod respond;
pub mod routes;
pub mod rules;
pub mod signing;
pub mod transforms;
pub mod upstream;
pub mod waf;

pub mod admin;
pub mod boot;
pub mod cli;
pub mod orders;
pub mod proxy;
pub mod reload;
pub mod state;
pub mod tasks;
