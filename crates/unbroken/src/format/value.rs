//! Canonical CBOR of values: one value, one byte string, on every machine and in every release.
//!
//! Touches: nothing. No recursion deeper than [`MAX_DEPTH`], no allocation that was not counted first.

use crate::digest::Digest;
use crate::format::Flaw;
use crate::state::Value;

/// How deep values may be nested.
pub const MAX_DEPTH: usize = 128;

/// Returns the canonical bytes of a value.
///
/// # Errors
///
/// [`Flaw::Limit`] where it is nested too deep or a name is too long; [`Flaw::Malformed`] where it breaks a rule of its
/// type: a big integer that is not canonical, a key twice.
pub fn encode(value: &Value) -> Result<Vec<u8>, Flaw> {
    let _ = value;
    unimplemented!()
}

/// Returns the value of canonical bytes.
///
/// # Errors
///
/// [`Flaw::Malformed`] where the bytes are not exactly what [`encode`] writes for any value; [`Flaw::Limit`].
pub fn decode(bytes: &[u8]) -> Result<Value, Flaw> {
    let _ = bytes;
    unimplemented!()
}

/// Returns the digest of a value's canonical bytes.
///
/// # Errors
///
/// Those of [`encode`].
pub fn digest_value(value: &Value) -> Result<Digest, Flaw> {
    encode(value).map(|bytes| Digest::of(&bytes))
}
