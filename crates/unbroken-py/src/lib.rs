//! The extension module `unbroken._core`: conversions, nothing clever.
