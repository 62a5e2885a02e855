//! Who is asking: the address, and the country it is in.

pub mod address;
pub mod country;
