//! A storage in memory that knows what a power cut would leave of it.
//!
//! Touches: nothing outside itself. Clones share the same files.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Claim, Input, Lock, Output, Storage, split};

/// What survives a power cut besides everything that was synced. A disk may do any of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftovers {
    /// Nothing else: names and bytes that were not synced are gone.
    Nothing,
    /// Names that were not synced are there, their bytes as far as synced.
    Names,
    /// Like `Names`, except in one directory, whose names are as last synced: directories reach the disk in any order.
    NamesExcept(&'static str),
    /// Names and bytes that were not synced are there.
    Everything,
}

/// One change that somebody made, for tests that build every disk that a power cut may leave of a history.
///
/// A file is known by its number: it keeps it when it is renamed, and after its last name is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A directory was made.
    CreateDir(String),
    /// An empty file was made.
    Create {
        /// Its number.
        file: usize,
        /// Its name.
        name: String,
    },
    /// Bytes were written to a file.
    Write {
        /// Its number.
        file: usize,
        /// Where they begin.
        offset: usize,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// A file was cut, or made longer with zeros.
    Resize {
        /// Its number.
        file: usize,
        /// Its length from then on.
        length: usize,
    },
    /// A file's bytes were made to survive.
    Sync(usize),
    /// A directory's names were made to survive.
    SyncDir(String),
    /// A file got another name.
    Rename {
        /// Its name until then.
        from: String,
        /// Its name from then on.
        to: String,
    },
    /// A name was removed.
    Remove(String),
}

#[derive(Clone, Debug, Default)]
struct Node {
    bytes: Vec<u8>,
    /// What the last sync made durable; shared, because most files are synced once and then only copied.
    synced: Arc<Vec<u8>>,
}

impl Node {
    fn sync(&mut self) {
        if self.bytes != *self.synced {
            self.synced = Arc::new(self.bytes.clone());
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Content {
    nodes: Vec<Node>,
    /// Directories by name; the root is `""`.
    directories: BTreeSet<String>,
    /// Files by their whole name.
    names: BTreeMap<String, usize>,
    synced_names: BTreeMap<String, usize>,
    locked: bool,
    /// What was done since recording began; nothing is kept before.
    history: Option<Vec<Effect>>,
}

impl Content {
    fn note(&mut self, effect: impl FnOnce() -> Effect) {
        if let Some(history) = &mut self.history {
            history.push(effect());
        }
    }
}

/// Files in memory.
#[derive(Clone, Debug)]
pub struct MemoryStorage {
    content: Arc<Mutex<Content>>,
    location: PathBuf,
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStorage {
    /// Returns an empty storage.
    pub fn new() -> Self {
        let directories = BTreeSet::from([String::new()]);
        let content = Content {
            directories,
            ..Content::default()
        };
        Self {
            content: Arc::new(Mutex::new(content)),
            location: PathBuf::from("memory:"),
        }
    }

    /// Returns what a power cut at this instant would leave, as a storage of its own, unlocked.
    ///
    /// Directories survive: they are made once, and synced by whoever makes them.
    pub fn after_power_cut(&self, leftovers: Leftovers) -> Self {
        let mut content = self.content().clone();
        content.locked = false;
        content.history = None;
        let inside = |file: &str, dir: &str| file.rsplit_once('/').map_or("", |(parent, _)| parent) == dir;
        match leftovers {
            Leftovers::Nothing => content.names = content.synced_names.clone(),
            Leftovers::NamesExcept(dir) => {
                content.names.retain(|file, _| !inside(file, dir));
                let synced = content.synced_names.iter().filter(|(file, _)| inside(file, dir));
                content
                    .names
                    .extend(synced.map(|(file, node)| (file.clone(), *node)));
            }
            Leftovers::Names | Leftovers::Everything => {}
        }
        if leftovers != Leftovers::Everything {
            for node in &mut content.nodes {
                node.bytes = node.synced.to_vec();
            }
        }
        content.synced_names = content.names.clone();
        for node in &mut content.nodes {
            node.sync();
        }
        Self {
            content: Arc::new(Mutex::new(content)),
            location: self.location.clone(),
        }
    }

    /// Returns every file's name and bytes, for tests that damage them.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let content = self.content();
        content
            .names
            .iter()
            .map(|(name, &node)| (name.clone(), content.nodes[node].bytes.clone()))
            .collect()
    }

    /// Puts bytes under a name, synced, replacing what is there: for tests that damage files.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut content = self.content();
        let node = content.nodes.len();
        let mut written = Node {
            bytes,
            ..Node::default()
        };
        written.sync();
        content.nodes.push(written);
        content.names.insert(name.to_owned(), node);
        content.synced_names.insert(name.to_owned(), node);
    }

    /// Begins to record what is done to it, from an empty history on.
    pub fn record(&self) {
        self.content().history = Some(Vec::new());
    }

    /// Returns what was done since recording began.
    pub fn history(&self) -> Vec<Effect> {
        self.content().history.clone().unwrap_or_default()
    }

    /// Returns every file's name and number in the history.
    pub fn numbers(&self) -> BTreeMap<String, usize> {
        self.content().names.clone()
    }

    /// Returns a copy that shares nothing with this one.
    pub fn fork(&self) -> Self {
        let content = Content {
            locked: false,
            ..self.content().clone()
        };
        Self {
            content: Arc::new(Mutex::new(content)),
            location: self.location.clone(),
        }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn rename(&self, from: &str, to: &str, replace: bool) -> io::Result<()> {
        split(from)?;
        let (dir, _) = split(to)?;
        let mut content = self.content();
        let node = *content.names.get(from).ok_or_else(missing)?;
        if !content.directories.contains(dir) {
            return Err(missing());
        }
        if !replace && content.names.contains_key(to) || content.directories.contains(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        content.names.remove(from);
        content.names.insert(to.to_owned(), node);
        content.note(|| Effect::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        });
        Ok(())
    }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Storage for MemoryStorage {
    fn location(&self) -> &Path {
        &self.location
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        split(name)?;
        let mut content = self.content();
        if content.names.contains_key(name) {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        if content.directories.insert(name.to_owned()) {
            content.note(|| Effect::CreateDir(name.to_owned()));
        }
        Ok(())
    }

    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>> {
        let (dir, _) = split(name)?;
        let mut content = self.content();
        if !content.directories.contains(dir) {
            return Err(missing());
        }
        if content.names.contains_key(name) || content.directories.contains(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = content.nodes.len();
        content.nodes.push(Node::default());
        content.names.insert(name.to_owned(), node);
        content.note(|| Effect::Create {
            file: node,
            name: name.to_owned(),
        });
        Ok(Box::new(MemoryFile {
            storage: self.clone(),
            node,
        }))
    }

    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>> {
        split(name)?;
        let node = {
            let content = self.content();
            let node = *content.names.get(name).ok_or_else(missing)?;
            if content.names.values().filter(|&&other| other == node).count() > 1 {
                return Ok(None);
            }
            node
        };
        Ok(Some(Box::new(MemoryFile {
            storage: self.clone(),
            node,
        })))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Input>> {
        split(name)?;
        let content = self.content();
        if content.directories.contains(name) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is a directory, not a plain file",
            ));
        }
        let node = *content.names.get(name).ok_or_else(missing)?;
        Ok(Box::new(MemoryFile {
            storage: self.clone(),
            node,
        }))
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.rename(from, to, false)
    }

    fn rename_over(&self, from: &str, to: &str) -> io::Result<()> {
        self.rename(from, to, true)
    }

    fn sync_dir(&self, name: &str) -> io::Result<()> {
        let mut content = self.content();
        if !content.directories.contains(name) {
            return Err(missing());
        }
        let inside = |file: &str| file.rsplit_once('/').map_or("", |(dir, _)| dir) == name;
        let live: Vec<_> = content
            .names
            .iter()
            .filter(|(file, _)| inside(file))
            .map(|(f, &n)| (f.clone(), n))
            .collect();
        content.synced_names.retain(|file, _| !inside(file));
        content.synced_names.extend(live);
        content.note(|| Effect::SyncDir(name.to_owned()));
        Ok(())
    }

    fn list(&self, name: &str) -> io::Result<Vec<String>> {
        let content = self.content();
        if !content.directories.contains(name) {
            return Err(missing());
        }
        let all = content.names.keys().chain(&content.directories);
        let inside = all.filter_map(|entry| match entry.rsplit_once('/') {
            Some((dir, last)) if dir == name => Some(last.to_owned()),
            None if name.is_empty() && !entry.is_empty() => Some(entry.clone()),
            _ => None,
        });
        Ok(inside.collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        split(name)?;
        let mut content = self.content();
        if content.directories.contains(name) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        content.names.remove(name).ok_or_else(missing)?;
        content.note(|| Effect::Remove(name.to_owned()));
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        split(name)?;
        let mut content = self.content();
        if content.locked {
            return Ok(Claim::Refused(Some(std::process::id())));
        }
        content.locked = true;
        Ok(Claim::Held(Box::new(MemoryLock(self.clone()))))
    }
}

#[derive(Debug)]
struct MemoryLock(MemoryStorage);

impl Lock for MemoryLock {
    fn check(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        self.0.content().locked = false;
    }
}

#[derive(Debug)]
struct MemoryFile {
    storage: MemoryStorage,
    node: usize,
}

impl Output for MemoryFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut content = self.storage.content();
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end = start + bytes.len();
        let into = &mut content.nodes[self.node].bytes;
        if into.len() < end {
            into.resize(end, 0);
        }
        into[start..end].copy_from_slice(bytes);
        content.note(|| Effect::Write {
            file: self.node,
            offset: start,
            bytes: bytes.to_vec(),
        });
        Ok(bytes.len())
    }

    fn reserve(&self, length: u64) -> io::Result<()> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut content = self.storage.content();
        content.nodes[self.node].bytes.resize(length, 0);
        content.note(|| Effect::Resize {
            file: self.node,
            length,
        });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut content = self.storage.content();
        content.nodes[self.node].sync();
        content.note(|| Effect::Sync(self.node));
        Ok(())
    }
}

impl Input for MemoryFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let content = self.storage.content();
        let bytes = &content.nodes[self.node].bytes;
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let count = into.len().min(bytes.len() - start);
        into[..count].copy_from_slice(&bytes[start..start + count]);
        Ok(count)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.storage.content().nodes[self.node].bytes.len() as u64)
    }
}
