//! Learning-rate schedulers to and from state: their counters and rates by name.
//!
//! Touches: nothing but what it is given.

use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn_pack::Reader;
use unbroken::Result;
use unbroken::train::{StateReader, StateWriter};

use crate::optimizer::{failed, scalar_value, value_scalar};

/// Writes a scheduler's state.
///
/// # Errors
///
/// A record that Burn cannot write.
pub fn write(scheduler: &ModuleLrScheduler, out: &mut StateWriter<'_>) -> Result<()> {
    let failed = failed("the scheduler's state cannot be read");
    let record = scheduler.to_record();
    let bytes = record.into_bytes().map_err(|error| failed(error.to_string()))?;
    let reader = Reader::from_bytes(bytes).map_err(|error| failed(error.to_string()))?;
    for (name, scalar) in reader.scalars() {
        out.value(name, scalar_value(*scalar))?;
    }
    Ok(())
}

/// Returns the scheduler with the state that [`write`] wrote.
///
/// # Errors
///
/// A value that is no number.
pub fn read(scheduler: ModuleLrScheduler, from: &mut StateReader<'_>) -> Result<ModuleLrScheduler> {
    let mut record = LrSchedulerRecord::new();
    for name in from.names() {
        record = record.with_scalar(name, value_scalar(from.value(name)?, name)?);
    }
    Ok(scheduler.load_record(record))
}
