//! Keys as a pure function of (seed, purpose, epoch, position), and random-access orders made from them.
//!
//! Touches: nothing.
