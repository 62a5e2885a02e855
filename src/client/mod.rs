//! Who is asking: the address, and where it is.

pub mod address;
pub mod asn;
pub mod atlas;
pub mod city;
pub mod country;
pub mod place;
pub mod standing;
