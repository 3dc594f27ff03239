//! Optimizers to and from state, each parameter's part under the parameter's path.
//!
//! Touches: nothing but what it is given. Burn's record is keyed by parameter ids, which every process draws anew; here
//! the module says which path an id stands for, now and on the way back.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use burn::module::{Module, ParamGroup, ParamId};
use burn::optim::{LBFGS, ModuleOptimizer, OptimizerRecord, SgdConfig};
use burn::tensor::Bytes as BurnBytes;
use burn_pack::{Reader, Scalar, Tensor, Writer};
use unbroken::train::{Bytes, StateReader, StateWriter};
use unbroken::{Error, Result, Value};

use crate::dtype::{self, Raw};
use crate::module;

/// What one parameter's state is made of.
#[derive(Default)]
struct Part {
    tensors: BTreeMap<String, Tensor>,
    scalars: BTreeMap<String, Scalar>,
}

pub(crate) fn failed(what: &'static str) -> impl Fn(String) -> Error {
    move |error| Error::invalid(format!("{what}: {error}"))
}

fn unpack(record: OptimizerRecord) -> Result<Reader> {
    let failed = failed("the optimizer's state cannot be read");
    let bytes = record.into_bytes().map_err(|error| failed(error.to_string()))?;
    Reader::from_bytes(bytes).map_err(|error| failed(error.to_string()))
}

fn pack(writer: Writer) -> Result<OptimizerRecord> {
    let failed = failed("the optimizer's state cannot be put back");
    let bytes: BurnBytes = writer.into_bytes().map_err(|error| failed(error.to_string()))?;
    OptimizerRecord::from_bytes(bytes).map_err(|error| failed(error.to_string()))
}

/// Writes the state of an optimizer over this module.
///
/// Burn gives it away as a copy, and packs that into others: so a large one is asked for some parameters at a time.
///
/// # Errors
///
/// State of a parameter that the module does not have.
pub fn write<M: Module>(optimizer: &ModuleOptimizer, module: &M, out: &mut StateWriter<'_>) -> Result<()> {
    let paths = module::paths(module);
    let turns = turns(&module::sizes(module));
    if turns.len() < 2 {
        return write_parts(optimizer.to_record(), &paths, out);
    }
    let ids = |parameters: &[(ParamId, String)]| parameters.iter().map(|(id, _)| *id).collect();
    let foreign = forget(optimizer, ParamGroup::from_ids(ids(&paths)));
    write_parts(foreign.to_record(), &[], out)?;
    for turn in turns {
        let chosen = &paths[turn];
        let others = ParamGroup::all().exclude(ParamGroup::from_ids(ids(chosen)));
        write_parts(forget(optimizer, others).to_record(), chosen, out)?;
    }
    Ok(())
}

/// Which parameters are read together, by their sizes in bytes.
fn turns(sizes: &[u64]) -> Vec<Range<usize>> {
    let most = (sizes.iter().sum::<u64>() / SHARES).max(SMALL);
    let mut turns = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (place, size) in sizes.iter().enumerate() {
        bytes += size;
        if bytes >= most || place + 1 == sizes.len() {
            turns.push(start..place + 1);
            (start, bytes) = (place + 1, 0);
        }
    }
    turns
}

/// In how many turns at most the state of a large optimizer is read.
const SHARES: u64 = 16;
/// Up to so many bytes of parameters are read in one turn.
const SMALL: u64 = 8 << 20;

/// The optimizer without the state of these parameters.
fn forget(optimizer: &ModuleOptimizer, parameters: ParamGroup) -> ModuleOptimizer {
    // Another optimizer for a group makes Burn drop what it knew about the group's parameters.
    optimizer
        .clone()
        .with_group(parameters, SgdConfig::new().build(), None)
}

/// Writes a record of state of these parameters.
fn write_parts(
    record: OptimizerRecord,
    parameters: &[(ParamId, String)],
    out: &mut StateWriter<'_>,
) -> Result<()> {
    let reader = unpack(record)?;
    let mut parts: HashMap<u64, Part> = HashMap::new();
    for (name, scalar) in reader.scalars() {
        let (id, leaf) = split(name)?;
        parts
            .entry(id)
            .or_default()
            .scalars
            .insert(leaf.to_owned(), *scalar);
    }
    for tensor in reader
        .into_tensors()
        .map_err(|error| failed("the optimizer's state")(error.to_string()))?
    {
        let (id, leaf) = split(&tensor.name)?;
        let leaf = leaf.to_owned();
        parts.entry(id).or_default().tensors.insert(leaf, tensor);
    }
    for (id, path) in parameters {
        if let Some(part) = parts.remove(&id.val()) {
            out.scope(path, |out| write_part(part, out))?;
        }
    }
    match parts.len() {
        0 => Ok(()),
        count => Err(Error::invalid(format!(
            "the optimizer has state of {count} parameters that are not in the module: was it used on another one?"
        ))),
    }
}

fn split(name: &str) -> Result<(u64, &str)> {
    let parts = name
        .split_once('.')
        .and_then(|(id, leaf)| Some((id.parse().ok()?, leaf)));
    parts.ok_or_else(|| Error::Unsupported {
        what: format!("optimizer state named `{name}`"),
    })
}

fn write_part(part: Part, out: &mut StateWriter<'_>) -> Result<()> {
    for (leaf, scalar) in part.scalars {
        out.value(&leaf, scalar_value(scalar))?;
    }
    for (leaf, tensor) in part.tensors {
        let (_, dtype, shape, _, bytes) = tensor
            .into_parts()
            .map_err(|error| failed("the optimizer's state")(error.to_string()))?;
        let name = dtype::name(dtype, &leaf)?;
        let sizes = dtype::sizes(&shape.to_vec());
        out.tensor_with(&leaf, name, dtype.size(), &sizes, || Bytes::owned(Raw(bytes)))?;
    }
    Ok(())
}

/// Returns the optimizer with the state that [`write`] wrote, over this module.
///
/// # Errors
///
/// State of a parameter that the module does not have, or that this kind of optimizer does not take.
pub fn read<M: Module>(
    optimizer: ModuleOptimizer,
    module: &M,
    from: &mut StateReader<'_>,
) -> Result<ModuleOptimizer> {
    let (record, count) = read_record(module, from)?;
    let optimizer = optimizer.load_record(record);
    // Burn leaves out what it does not understand, and would begin anew there without a word.
    check_count(count, optimizer.to_record().len())?;
    Ok(optimizer)
}

fn check_count(expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the optimizer took {found} of {expected} tensors of the checkpoint: is it of another kind?"
    )))
}

/// Burn's record of what [`write`] wrote, and how many tensors it has.
fn read_record<M: Module>(module: &M, from: &mut StateReader<'_>) -> Result<(OptimizerRecord, usize)> {
    let ids: HashMap<String, u64> = module::paths(module)
        .into_iter()
        .map(|(id, path)| (path, id.val()))
        .collect();
    let mut tensors = Vec::new();
    let mut scalars = Vec::new();
    let mut metadata = Vec::new();
    for path in from.names() {
        let id = *ids
            .get(path)
            .ok_or_else(|| Error::invalid(format!("`{path}` is not in the module")))?;
        metadata.push((id.to_string(), path));
        from.scope(path, |from| {
            read_part(from, Some(id), &format!("{id}."), &mut tensors, &mut scalars)
        })?;
    }
    let count = tensors.len();
    let writer = scalars
        .iter()
        .fold(Writer::new(tensors), |writer, (name, scalar)| {
            writer.with_scalar(name, *scalar)
        });
    let writer = metadata
        .iter()
        .fold(writer, |writer, (id, path)| writer.with_metadata(id, path));
    Ok((pack(writer)?, count))
}

fn read_part(
    from: &mut StateReader<'_>,
    id: Option<u64>,
    prefix: &str,
    tensors: &mut Vec<Tensor>,
    scalars: &mut Vec<(String, Scalar)>,
) -> Result<()> {
    for leaf in from.names() {
        let name = format!("{prefix}{leaf}");
        if let Ok(tensor) = from.tensor(leaf) {
            let (bytes, shape, dtype) = dtype::data(tensor, leaf)?.into_parts();
            tensors.push(Tensor::new(name, dtype, shape, id, bytes));
        } else {
            scalars.push((name, value_scalar(from.value(leaf)?, leaf)?));
        }
    }
    Ok(())
}

/// Writes the state of L-BFGS, which has one for the whole module.
///
/// # Errors
///
/// A tensor of a type that checkpoints do not have.
pub fn write_lbfgs(optimizer: &LBFGS, out: &mut StateWriter<'_>) -> Result<()> {
    let reader = unpack(optimizer.to_record())?;
    let scalars = reader.scalars().clone();
    let tensors = reader
        .into_tensors()
        .map_err(|error| failed("the optimizer's state")(error.to_string()))?;
    let tensors = tensors
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect();
    write_part(Part { tensors, scalars }, out)
}

/// Returns L-BFGS with the state that [`write_lbfgs`] wrote.
///
/// # Errors
///
/// State that L-BFGS does not take.
pub fn read_lbfgs(optimizer: LBFGS, from: &mut StateReader<'_>) -> Result<LBFGS> {
    let (mut tensors, mut scalars) = (Vec::new(), Vec::new());
    read_part(from, None, "", &mut tensors, &mut scalars)?;
    let count = tensors.len();
    let writer = scalars
        .iter()
        .fold(Writer::new(tensors), |writer, (name, scalar)| {
            writer.with_scalar(name, *scalar)
        });
    let optimizer = optimizer.load_record(pack(writer)?);
    check_count(count, optimizer.to_record().len())?;
    Ok(optimizer)
}

pub(crate) fn scalar_value(scalar: Scalar) -> Value {
    match scalar {
        Scalar::Int(number) => number.into(),
        Scalar::UInt(number) => number.into(),
        Scalar::Float(number) => number.into(),
        Scalar::Bool(flag) => flag.into(),
    }
}

pub(crate) fn value_scalar(value: &Value, name: &str) -> Result<Scalar> {
    match value {
        Value::Int(number) => Ok(Scalar::Int(*number)),
        Value::BigInt {
            negative: false,
            magnitude,
        } if magnitude.len() <= 8 => Ok(Scalar::UInt(
            magnitude
                .iter()
                .fold(0, |number, byte| number << 8 | u64::from(*byte)),
        )),
        Value::Float(bits) => Ok(Scalar::Float(f64::from_bits(*bits))),
        Value::Bool(flag) => Ok(Scalar::Bool(*flag)),
        other => Err(Error::invalid(format!(
            "`{name}` is no number in the checkpoint: {other:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_has_one_turn_and_a_small_module_has_one_in_all() {
        let places = |sizes: &[u64]| -> Vec<(usize, usize)> {
            let turns = turns(sizes).into_iter();
            turns.map(|turn| (turn.start, turn.end)).collect()
        };
        assert_eq!(places(&[100, 200, 300]), [(0, 3)]);
        assert!(places(&[]).is_empty());
        let megabytes = [900, 0, 0, 40, 40, 0, 600, 0];
        let sizes = megabytes.map(|megabytes| (megabytes << 20) + 1);
        assert_eq!(places(&sizes), [(0, 1), (1, 7), (7, 8)]);
    }
}
