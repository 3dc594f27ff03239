//! Retention: which checkpoints stay, decided first and shown on request, then carried out manifest first.
//!
//! Touches: `checkpoints/` and `objects/`, only ever removing; never a file of another run or one it cannot read.

use std::collections::BTreeSet;

use super::{CHECKPOINTS, Checkpoint, CheckpointInfo, Store, is_damage, remove_packs, unreferenced_packs};
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
    /// How many to keep.
    pub count: usize,
}

/// What to keep: whatever any rule keeps, pinned checkpoints and the newest. No rule at all keeps everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Keep this many newest ones.
    pub last: Option<usize>,
    /// Keep those whose step is a multiple of this.
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
        let last = self.last.unwrap_or(1); // The newest stays whatever the rules say.
        kept.extend(checkpoints.iter().rev().take(last).map(|info| &*info.name));
        if let Some(every) = self.every {
            kept.extend(
                checkpoints
                    .iter()
                    .filter(|info| info.step % every == 0)
                    .map(|info| &*info.name),
            );
        }
        if let Some(best) = &self.best {
            kept.extend(best.pick(checkpoints));
        }
        let gone = checkpoints.iter().filter(|info| !kept.contains(&*info.name));
        Ok(gone.map(|info| info.name.clone()).collect())
    }
}

impl Best {
    /// The best ones' names; of equal values the older ones'.
    fn pick<'a>(&self, checkpoints: &'a [CheckpointInfo]) -> Vec<&'a str> {
        let value = |info: &CheckpointInfo| {
            let metric = info.metrics.iter().find(|(name, _)| *name == self.metric);
            metric.map(|(_, value)| *value).filter(|value| !value.is_nan())
        };
        let mut ranked: Vec<(f64, &str)> = checkpoints
            .iter()
            .filter_map(|info| Some((value(info)?, &*info.name)))
            .collect();
        ranked.sort_by(|(a, _), (b, _)| match self.order {
            Order::Min => a.total_cmp(b),
            Order::Max => b.total_cmp(a),
        });
        ranked
            .into_iter()
            .take(self.count)
            .map(|(_, name)| name)
            .collect()
    }
}

impl Store {
    /// Deletes what the policy does not keep, and returns the names, oldest first.
    ///
    /// # Durability
    ///
    /// Manifests go first; packs only when no manifest that could come back refers to them. A crash leaves garbage.
    ///
    /// # Errors
    ///
    /// The newest checkpoint is read in full before anything goes; its damage is an error, and nothing goes.
    pub(crate) fn prune(&mut self, policy: &Retention, dry_run: bool) -> Result<Vec<String>> {
        let names = policy.plan(&self.checkpoints())?;
        if dry_run || (names.is_empty() && !self.removing) {
            return Ok(names);
        }
        let newest = self
            .newest()
            .expect("something goes, so something stays")
            .info
            .name
            .clone();
        Checkpoint::load(&self.directory, &newest)?.verify()?;
        self.removing = true;
        for name in &names {
            self.directory.remove(&format!("{CHECKPOINTS}/{name}"))?;
            self.catalog.remove(name);
        }
        self.directory.sync_dir(CHECKPOINTS)?;
        if let Some(referenced) = self.referenced()? {
            self.places
                .retain(|_, place| referenced.contains(&place.pack.name));
            remove_packs(
                &self.directory,
                &unreferenced_packs(&self.directory, &referenced)?,
            )?;
        }
        self.removing = false;
        Ok(names)
    }

    /// Returns the packs that manifests refer to; `None` where a file among the manifests cannot be read.
    fn referenced(&self) -> Result<Option<BTreeSet<String>>> {
        let mut referenced = BTreeSet::new();
        for name in self.directory.list(CHECKPOINTS)? {
            if let Some(entry) = self.catalog.get(&name) {
                referenced.extend(entry.packs.iter().map(|pack| pack.name.clone()));
                continue;
            }
            // Another run's, or one that was rejected: it is not ours to judge what it needs.
            if manifest::parse_checkpoint_name(&name).is_none() {
                return Ok(None);
            }
            match Checkpoint::load(&self.directory, &name) {
                Ok(checkpoint) => {
                    referenced.extend(checkpoint.manifest.packs.iter().map(|pack| pack.name.clone()))
                }
                Err(error) if is_damage(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(referenced))
    }
}
