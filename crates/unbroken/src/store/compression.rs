//! Compression on request: which storages are coded, in what form, and what later ones are told as differences to.
//!
//! Touches: memory. Samples decide before anything is compressed, so that noise costs next to nothing. Differences are
//! to one earlier commit, the base, whose bytes are kept in memory; never to a difference, so that a storage is read from
//! two packs at most. When the last commit took more than the commits since the base did on average, the next one is the
//! new base.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;

use super::parallel::each_in_parallel;
use super::read::check_of;
use super::walk;
use crate::arena::Arena;
use crate::digest::{Assembly, Digest, GROUP};
use crate::error::Result;
use crate::format::coded::{self, BLOCK, Coder, Planes};
use crate::format::manifest::{Coded, Layer, Manifest, PackEntry, Place, element_size};
use crate::state::Value;

/// Whether and how what is written is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Everything is written as it is.
    #[default]
    None,
    /// Each storage by itself.
    Alone,
    /// As differences to an earlier commit where that is shorter. Takes memory for one copy of the state.
    Differences,
}

/// Shorter storages are written as they are: what the manifest says of their frames would cost what they save.
const LEAST: usize = 4 << 10;
/// Bytes of a sample, and how many places they are from.
const SAMPLE: usize = 64 << 10;
const WINDOWS: usize = 4;

/// What a sample has become, in proportion, where coding is worth the work.
const WORTH: f64 = 0.97;

/// What later storages are differences to.
#[derive(Debug)]
pub(super) struct Bases {
    memory: Arena,
    of: HashMap<usize, Base>,
    /// How long, in proportion, what was coded became: when the base was made and since, and how often that was.
    sum: f64,
    count: f64,
    last: f64,
}

/// One storage's base.
#[derive(Clone, Debug)]
struct Base {
    at: Range<usize>,
    width: usize,
    /// Where it is on the disk; the number of its pack is no manifest's.
    layer: Layer,
    pack: PackEntry,
}

impl Bases {
    /// The packs that differences to it need.
    pub fn packs(&self) -> impl Iterator<Item = &PackEntry> {
        let mut seen = HashSet::new();
        let packs = self.of.values().map(|base| &base.pack);
        packs.filter(move |pack| seen.insert(&pack.name))
    }

    /// Whether a new base would be better: commits get shorter on average if it is made now.
    pub fn is_worn(&self) -> bool {
        self.count > 1.0 && self.last * self.count >= self.sum
    }

    /// Takes note of how long a commit with this base became.
    pub fn note(&mut self, made: &Made) {
        if made.before > 0 {
            self.last = made.after as f64 / made.before as f64;
            self.sum += self.last;
            self.count += 1.0;
        }
    }

    /// The memory that it took.
    pub fn into_memory(self) -> Arena {
        self.memory
    }

    fn of(&self, candidate: &Candidate) -> Option<(&Base, &[u8])> {
        let base = self.of.get(&candidate.storage)?;
        let bytes = &self.memory.bytes()[base.at.clone()];
        (bytes.len() == candidate.bytes.len() && base.width == candidate.width).then_some((base, bytes))
    }
}

/// A storage that may be coded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    /// Its index.
    pub storage: usize,
    pub bytes: &'a [u8],
    /// Bytes of its numbers.
    pub width: usize,
}

impl Candidate<'_> {
    /// Whether that can be worth anything.
    pub fn is_one(&self) -> bool {
        self.bytes.len() >= LEAST
    }

    /// How many frames it has in a layer.
    pub fn frames(&self) -> usize {
        self.bytes.len().div_ceil(BLOCK)
    }
}

/// Bytes of the numbers in each storage of a tree, where that is known; 1 elsewhere.
pub(super) fn widths(tree: &Value, count: usize) -> Vec<usize> {
    let mut widths = vec![1; count];
    let mut seen = HashSet::new();
    walk(tree, &mut |_, tensor| {
        if let Some(width) = widths.get_mut(tensor.storage as usize)
            && seen.insert(tensor.storage)
        {
            let parts = if tensor.dtype.starts_with("complex") { 2 } else { 1 };
            *width = element_size(&tensor.dtype).map_or(1, |size| size as usize / parts);
        }
    });
    widths
}

/// A storage that was coded.
#[derive(Debug)]
pub(super) struct Compressed {
    pub storage: usize,
    /// Its bytes' digest.
    pub digest: Digest,
    pub frames: Vec<Vec<u8>>,
    /// Each frame's digest.
    pub digests: Vec<Digest>,
    width: usize,
    /// What it is differences to, if it is.
    base: Option<Base>,
}

impl Compressed {
    /// Bytes of all frames.
    pub fn length(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }

    /// Where all of it is, once its frames lie in pack `new` from `offset` on. `number` says which numbers others have.
    pub fn place(&self, new: u32, offset: u64, mut number: impl FnMut(&PackEntry) -> u32) -> Place {
        let base = self.base.iter().map(|base| Layer {
            pack: number(&base.pack),
            ..base.layer.clone()
        });
        let mut layers: Vec<Layer> = base.collect();
        layers.push(Layer {
            pack: new,
            check: check_of(&self.digests),
            offset,
            frames: self.frames.iter().map(|frame| frame.len() as u64).collect(),
        });
        Place::Coded(Coded {
            width: self.width as u64,
            layers,
        })
    }
}

/// What compressing came to: storages that were coded, in their order, and what could be a base.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub compressed: Vec<Compressed>,
    /// Their bytes before and after.
    before: u64,
    after: u64,
    /// Copies of their bytes, where they are to be a base.
    base: Option<(Arena, HashMap<usize, Range<usize>>)>,
}

impl Made {
    /// The base that a commit has made, if it has, now that its manifest says where it is.
    pub fn take_base(&mut self, manifest: &Manifest) -> Option<Bases> {
        let (memory, ranges) = self.base.take()?;
        let base = |(storage, at): (usize, Range<usize>)| {
            let Place::Coded(Coded { width, layers }) = &manifest.storages[storage].place else {
                return None;
            };
            let [layer] = layers.as_slice() else { return None };
            let base = Base {
                at,
                width: *width as usize,
                layer: layer.clone(),
                pack: manifest.packs[layer.pack as usize].clone(),
            };
            Some((storage, base))
        };
        Some(Bases {
            of: ranges.into_iter().filter_map(base).collect(),
            memory,
            sum: 0.0,
            count: 0.0,
            last: 0.0,
        })
    }
}

/// What storages are compressed against.
pub(super) enum Against<'a> {
    /// Nothing: each is by itself.
    Nothing,
    /// What is known of them.
    Bases(&'a Bases),
    /// Nothing yet: they become what later ones are differences to, copied into this memory.
    Later(Arena),
}

/// In what form a storage is coded.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Form {
    planes: Planes,
    differs: bool,
}

/// Codes those candidates that are worth it.
///
/// Each block is copied once, and what is coded and digested is that copy: whoever changes a storage meanwhile gets a
/// checkpoint of some bytes, whole and with their own digest.
pub(super) fn compress(candidates: &[Candidate], against: Against) -> Result<Made> {
    let bases = match &against {
        Against::Bases(bases) => Some(*bases),
        Against::Nothing | Against::Later(_) => None,
    };
    let all = matches!(against, Against::Later(_));
    let forms = weigh_all(candidates, bases, all)?;
    let chosen: Vec<(&Candidate, Form)> = candidates
        .iter()
        .zip(forms)
        .filter_map(|(candidate, form)| Some((candidate, form?)))
        .collect();
    let mut base = match against {
        Against::Later(memory) => Some((memory, ranges_of(candidates))),
        Against::Nothing | Against::Bases(_) => None,
    };
    let coding: Vec<Coding> = chosen
        .iter()
        .map(|(candidate, form)| Coding::of(candidate, *form, bases))
        .collect();
    code_all(&coding, base.as_mut().map(|(memory, _)| memory.bytes_mut()))?;
    let compressed: Vec<Compressed> = coding.into_iter().map(Coding::finish).collect();
    Ok(Made {
        before: chosen
            .iter()
            .map(|(candidate, _)| candidate.bytes.len() as u64)
            .sum(),
        after: compressed.iter().map(Compressed::length).sum(),
        compressed,
        base,
    })
}

/// Bytes of memory for copies of all candidates.
pub(super) fn memory_for(candidates: &[Candidate]) -> usize {
    candidates.iter().map(|candidate| candidate.bytes.len()).sum()
}

fn ranges_of(candidates: &[Candidate]) -> HashMap<usize, Range<usize>> {
    let mut end = 0;
    let range = |candidate: &Candidate| {
        end += candidate.bytes.len();
        (candidate.storage, end - candidate.bytes.len()..end)
    };
    candidates.iter().map(range).collect()
}

/// Decides by samples in which form each candidate is coded, if it is; with `all`, each is.
fn weigh_all(candidates: &[Candidate], bases: Option<&Bases>, all: bool) -> Result<Vec<Option<Form>>> {
    let forms: Vec<OnceLock<Option<Form>>> = candidates.iter().map(|_| OnceLock::new()).collect();
    let items: Vec<_> = candidates.iter().zip(&forms).collect();
    let total = (items.len() * SAMPLE) as u64;
    each_in_parallel(total, items, |scratch: &mut Scratch, (candidate, form)| {
        let mut weigh = |base| weigh(scratch, candidate, base);
        let alone = weigh(None);
        let differences = bases
            .and_then(|bases| bases.of(candidate))
            .map(|(_, base)| weigh(Some(base)));
        form.set(choose(alone, differences, all))
            .expect("each is weighed once");
        Ok(())
    })?;
    let taken = |form: OnceLock<Option<Form>>| form.into_inner().expect("each was weighed");
    Ok(forms.into_iter().map(taken).collect())
}

/// Which planes of a sample are worth compressing, and how long the sample is then, in proportion.
fn weigh(scratch: &mut Scratch, candidate: &Candidate, base: Option<&[u8]>) -> (Planes, f64) {
    let length = candidate.bytes.len();
    let window = if length <= SAMPLE {
        length
    } else {
        SAMPLE / WINDOWS
    };
    let count = if length <= SAMPLE { 1 } else { WINDOWS };
    scratch.block.clear();
    for index in 0..count {
        let start = (length - window) / (WINDOWS - 1) * index / 8 * 8;
        scratch
            .block
            .extend_from_slice(&candidate.bytes[start..start + window]);
        if let Some(base) = base {
            let sample = &mut scratch.block[index * window..];
            coded::subtract(sample, &base[start..start + window], candidate.width);
        }
    }
    let (planes, weighed) = scratch.coder.weigh(&scratch.block, candidate.width);
    (planes, weighed as f64 / scratch.block.len() as f64)
}

fn choose(alone: (Planes, f64), differences: Option<(Planes, f64)>, all: bool) -> Option<Form> {
    let form = |planes, differs| Some(Form { planes, differs });
    match differences {
        Some((planes, length)) if length <= WORTH && length < alone.1 => form(planes, true),
        _ if all || alone.1 <= WORTH => form(alone.0, false),
        _ => None,
    }
}

/// A storage that is being coded.
struct Coding<'a> {
    candidate: Candidate<'a>,
    planes: Planes,
    base: Option<(&'a Base, &'a [u8])>,
    digest: Assembly,
    frames: Vec<OnceLock<(Vec<u8>, Digest)>>,
}

/// A thread's own memory.
#[derive(Default)]
struct Scratch {
    coder: Coder,
    block: Vec<u8>,
}

impl<'a> Coding<'a> {
    fn of(candidate: &Candidate<'a>, form: Form, bases: Option<&'a Bases>) -> Coding<'a> {
        Coding {
            candidate: *candidate,
            planes: form.planes,
            base: bases
                .filter(|_| form.differs)
                .and_then(|bases| bases.of(candidate)),
            digest: Assembly::new(candidate.bytes.len() as u64),
            frames: (0..candidate.frames()).map(|_| OnceLock::new()).collect(),
        }
    }

    fn code(&self, scratch: &mut Scratch, number: usize, copy: Option<&mut [u8]>) {
        let Scratch { coder, block } = scratch;
        let at = number * BLOCK..((number + 1) * BLOCK).min(self.candidate.bytes.len());
        block.clear();
        block.extend_from_slice(&self.candidate.bytes[at.clone()]);
        self.digest.put(number * (BLOCK / GROUP), block);
        if let Some(copy) = copy {
            copy.copy_from_slice(block);
        }
        if let Some((_, base)) = self.base {
            coded::subtract(block, &base[at], self.candidate.width);
        }
        let frame = coder.encode(block, self.candidate.width, self.planes);
        let coded = (frame.to_vec(), Digest::of(frame));
        self.frames[number].set(coded).expect("each block is coded once");
    }

    fn finish(self) -> Compressed {
        let frames = self.frames.into_iter();
        let (frames, digests) = frames
            .map(|frame| frame.into_inner().expect("each block was coded"))
            .unzip();
        Compressed {
            storage: self.candidate.storage,
            digest: self.digest.finish(),
            frames,
            digests,
            width: self.candidate.width,
            base: self.base.map(|(base, _)| base.clone()),
        }
    }
}

/// Codes all blocks, and with `memory` copies them there, one storage behind the other.
fn code_all(coding: &[Coding], mut memory: Option<&mut [u8]>) -> Result<()> {
    let mut items = Vec::new();
    for storage in coding {
        let mut copies = memory.take().map(|all| {
            let (own, rest) = all.split_at_mut(storage.candidate.bytes.len());
            memory = Some(rest);
            own.chunks_mut(BLOCK)
        });
        for number in 0..storage.frames.len() {
            items.push((storage, number, copies.as_mut().and_then(Iterator::next)));
        }
    }
    let total = coding
        .iter()
        .map(|storage| storage.candidate.bytes.len() as u64)
        .sum();
    each_in_parallel(total, items, |scratch: &mut Scratch, (storage, number, copy)| {
        storage.code(scratch, number, copy);
        Ok(())
    })
}
