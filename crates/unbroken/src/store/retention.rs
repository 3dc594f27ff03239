//! Retention: which checkpoints stay, decided first and shown on request, then carried out manifest first.
//!
//! Touches: `checkpoints/` and `objects/`, only ever removing; never a file of another run or one it cannot read. One
//! pack's file is moved to `tmp/` instead, for the next pack to be written over it: its blocks are on the disk already.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{CHECKPOINTS, Checkpoint, CheckpointInfo, OBJECTS, SPARE, Store, TMP};
use super::{is_aside, is_damage, random_name, remove_packs, unreferenced_packs};
use crate::error::{Error, Result};
use crate::format::manifest;

/// Which way a metric gets better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Lower is better.
    Min,
    /// Higher is better.
    Max,
}

/// Keeps the checkpoints with the best values of one metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Best {
    /// Its name among the checkpoint's metrics; checkpoints without it, or with NaN, are not among the best.
    pub metric: String,
    /// Which way it gets better.
    pub order: Order,
    /// How many to keep, each of another step.
    pub count: usize,
}

/// What to keep: whatever any rule keeps, pinned checkpoints and the newest. No rule at all keeps everything.
///
/// Steps are counted, not manifests: the checkpoints of one step (after it, after its epoch's work, at the run's end)
/// share their packs, so that what damages one of them damages all. The newest of a step stands for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Keep this many newest steps.
    pub last: Option<usize>,
    /// Keep steps that are a multiple of this.
    pub every: Option<u64>,
    /// Keep the best.
    pub best: Option<Best>,
}

impl Retention {
    /// Returns the names that go, oldest first. `checkpoints` are one run's, oldest first.
    ///
    /// # Errors
    ///
    /// `Invalid` where a rule is for 0 checkpoints or every 0 steps.
    pub fn plan(&self, checkpoints: &[CheckpointInfo]) -> Result<Vec<String>> {
        if self.last == Some(0)
            || self.every == Some(0)
            || self.best.as_ref().is_some_and(|best| best.count == 0)
        {
            return Err(Error::invalid("a retention rule must be for at least 1"));
        }
        if self == &Retention::default() {
            return Ok(Vec::new());
        }
        let mut kept: BTreeSet<&str> = checkpoints
            .iter()
            .filter(|info| info.pinned)
            .map(|info| &*info.name)
            .collect();
        // Later ones take the place of earlier ones of the same step.
        let steps: BTreeMap<u64, &str> = checkpoints.iter().map(|info| (info.step, &*info.name)).collect();
        kept.extend(steps.values().rev().take(self.newest()));
        if let Some(every) = self.every {
            let multiples = steps.iter().filter(|(step, _)| *step % every == 0);
            kept.extend(multiples.map(|(_, name)| name));
        }
        if let Some(best) = &self.best {
            kept.extend(best.pick(checkpoints));
        }
        let gone = checkpoints.iter().filter(|info| !kept.contains(&*info.name));
        Ok(gone.map(|info| info.name.clone()).collect())
    }

    /// How many newest steps it keeps: the newest stays whatever the rules say.
    fn newest(&self) -> usize {
        self.last.unwrap_or(1)
    }
}

impl Best {
    /// The best ones' names, one a step; of equal values the older ones'.
    fn pick<'a>(&self, checkpoints: &'a [CheckpointInfo]) -> Vec<&'a str> {
        let value = |info: &CheckpointInfo| {
            let metric = info.metrics.iter().find(|(name, _)| *name == self.metric);
            metric.map(|(_, value)| *value).filter(|value| !value.is_nan())
        };
        let mut ranked: Vec<(f64, &CheckpointInfo)> = checkpoints
            .iter()
            .filter_map(|info| Some((value(info)?, info)))
            .collect();
        ranked.sort_by(|(a, _), (b, _)| match self.order {
            Order::Min => a.total_cmp(b),
            Order::Max => b.total_cmp(a),
        });
        let mut steps = BTreeSet::new();
        ranked
            .into_iter()
            .filter(|(_, info)| steps.insert(info.step))
            .take(self.count)
            .map(|(_, info)| &*info.name)
            .collect()
    }
}

impl Store {
    /// Deletes what the policy does not keep, and returns the names, oldest first.
    ///
    /// # Durability
    ///
    /// Manifests go first; packs only when no manifest that could come back refers to them. A crash leaves garbage. While
    /// a file among the manifests cannot be read, no pack goes, and that is noticed ([`Store::take_notices`]).
    ///
    /// # Errors
    ///
    /// Nothing goes before a checkpoint among the newest that stay was read back in full since it was written; damage of
    /// the newest is an error, and nothing goes.
    pub(crate) fn prune(&mut self, policy: &Retention, dry_run: bool) -> Result<Vec<String>> {
        let names = policy.plan(&self.checkpoints())?;
        if dry_run || (names.is_empty() && !self.removing) {
            return Ok(names);
        }
        self.read_back(policy, &names)?;
        let mut lengths = HashMap::new();
        self.removing = true;
        for name in &names {
            self.directory.remove(&format!("{CHECKPOINTS}/{name}"))?;
            let entry = self.catalog.remove(name);
            self.read_back.remove(name);
            let packs = entry.iter().flat_map(|entry| &*entry.packs);
            lengths.extend(packs.map(|pack| (pack.name.clone(), pack.length)));
        }
        self.directory.sync_dir(CHECKPOINTS)?;
        match self.referenced()? {
            Ok(referenced) => {
                self.held_up = None;
                self.remove_garbage(&referenced, &lengths)?;
            }
            // Said once for each cause: there is a prune behind each checkpoint.
            Err(why) if self.held_up.as_ref() != Some(&why) => {
                self.notices.push(why.clone());
                self.held_up = Some(why);
            }
            Err(_) => {}
        }
        self.removing = false;
        Ok(names)
    }

    /// Removes packs that no manifest refers to, but for one of the deleted ones (`lengths`) that is worth writing over.
    fn remove_garbage(
        &mut self,
        referenced: &BTreeSet<String>,
        lengths: &HashMap<String, u64>,
    ) -> Result<()> {
        self.places
            .retain(|_, known| known.used_packs().all(|pack| referenced.contains(&pack.name)));
        let mut garbage = unreferenced_packs(&self.directory, referenced)?;
        if self.spare.is_none()
            && let Some(at) = garbage.iter().position(|name| {
                lengths
                    .get(name)
                    .is_some_and(|&length| length >= self.tuning.reuse_from)
            })
        {
            let spare = format!("{TMP}/{}{SPARE}", random_name()?);
            let pack = garbage.swap_remove(at);
            // No manifest that could come back names it: theirs are gone for good.
            self.directory.rename_new(&format!("{OBJECTS}/{pack}"), &spare)?;
            self.spare = Some(spare);
        }
        remove_packs(&self.directory, &garbage)
    }

    /// Makes sure that what stays can be read: the newest checkpoint's manifest and packs are as they should be, and one
    /// of the newest steps that stay was read in full. Reading each in full would double what a save costs.
    fn read_back(&mut self, policy: &Retention, going: &[String]) -> Result<()> {
        let mut staying = self.checkpoints();
        staying.retain(|info| !going.contains(&info.name));
        let first = &staying.last().expect("something goes, so the newest stays").name;
        let checkpoint = Checkpoint::load(&self.directory, first)?;
        let steps: BTreeSet<u64> = staying.iter().map(|info| info.step).collect();
        let newest: BTreeSet<u64> = steps.into_iter().rev().take(policy.newest()).collect();
        let was_read = |info: &CheckpointInfo| self.read_back.contains(&info.name);
        if staying
            .iter()
            .any(|info| newest.contains(&info.step) && was_read(info))
        {
            return checkpoint.check_packs();
        }
        checkpoint.verify()?;
        self.read_back.insert(first.clone());
        Ok(())
    }

    /// Returns the packs that manifests refer to; in words, which file among the manifests leaves that open.
    fn referenced(&self) -> Result<std::result::Result<BTreeSet<String>, String>> {
        let mut referenced = BTreeSet::new();
        for name in self.directory.list(CHECKPOINTS)? {
            if let Some(entry) = self.catalog.get(&name) {
                referenced.extend(entry.packs.iter().map(|pack| pack.name.clone()));
                continue;
            }
            if is_aside(&name) {
                continue;
            }
            // Another run's, or one that was rejected: it is not ours to judge what it needs.
            if manifest::parse_checkpoint_name(&name).is_none() {
                return Ok(Err(format!(
                    "`{CHECKPOINTS}/{name}` is no checkpoint, so nobody can tell which packs it needs: none is deleted \
                     while it is there; move it elsewhere"
                )));
            }
            match Checkpoint::load(&self.directory, &name) {
                Ok(checkpoint) => {
                    referenced.extend(checkpoint.manifest.packs.iter().map(|pack| pack.name.clone()))
                }
                Err(error) if is_damage(&error) => {
                    return Ok(Err(format!(
                        "nobody can tell which packs the checkpoint `{name}` needs, so none is deleted while it is \
                         there; `unbroken repair` puts it aside: {error}"
                    )));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Ok(referenced))
    }
}
