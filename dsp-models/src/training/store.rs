//! Checkpoints in a folder: each is there whole, or not at all.
//!
//! ```text
//!   checkpoints/
//!     step-00000100/        SHA256SUMS, as `sha256sum -c` reads it, and the files that it lists
//!     step-00000200/
//!     .step-00000300.…      being written: renamed when every byte is on the disk
//! ```
//!
//! A folder appears under its name by one rename, after its files were synced; an old one loses its name by one
//! rename, before its files are removed. So a writer may die at any moment. Damage that happens later is found by
//! the digests, of which every file has one and which are themselves read strictly.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

const SUMS: &str = "SHA256SUMS";
const PREFIX: &str = "step-";
const HIDDEN: &str = ".step-";

/// A folder of checkpoints.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

/// A checkpoint's files, all of them as they were written.
#[derive(Debug, Clone)]
pub struct Loaded {
    place: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
}

/// Why a checkpoint was not written or cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The system refused.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A name that no file of a checkpoint can have.
    #[error("{name:?} is no name for a file of a checkpoint: {rule}")]
    Name {
        /// The name.
        name: String,
        /// The rule.
        rule: &'static str,
    },
    /// There is nothing there.
    #[error("{}: there is no checkpoint", place.display())]
    Absent {
        /// Where it was looked for.
        place: PathBuf,
    },
    /// A checkpoint that would not be the last one.
    #[error(
        "{}: has the checkpoint of step {latest} already, and that of step {step} would not be the last one",
        folder.display()
    )]
    NotLast {
        /// The store.
        folder: PathBuf,
        /// The step that was to be written.
        step: u64,
        /// The last one that is there.
        latest: u64,
    },
    /// A folder without digests.
    #[error("{}: has no {SUMS}: this is no checkpoint", place.display())]
    NoCheckpoint {
        /// The folder.
        place: PathBuf,
    },
    /// Digests that were not written by a [`Store`].
    #[error("{}: {SUMS} is damaged: line {line} is not what was written", place.display())]
    Sums {
        /// The checkpoint.
        place: PathBuf,
        /// The first line that is wrong, from 1.
        line: usize,
    },
    /// A file that is listed and not there.
    #[error("{}: lacks the file {name}", place.display())]
    Missing {
        /// The checkpoint.
        place: PathBuf,
        /// The file.
        name: String,
    },
    /// A file that is there and not listed.
    #[error("{}: holds {name}, which {SUMS} does not list", place.display())]
    Extra {
        /// The checkpoint.
        place: PathBuf,
        /// The file.
        name: String,
    },
    /// A file that is not what was written.
    #[error(
        "{}: {name} is damaged: its SHA-256 is {found}, and it was written with {expected}",
        place.display()
    )]
    Damaged {
        /// The checkpoint.
        place: PathBuf,
        /// The file.
        name: String,
        /// The digest that it was written with.
        expected: String,
        /// The digest that it has.
        found: String,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

impl Store {
    /// The store in a folder, which is made if it is not there. What writers that died left behind is removed.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the folder cannot be made or written to: before any work, not after it.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self {
            folder: folder.into(),
        };
        let folder = &store.folder;
        fs::create_dir_all(folder).map_err(failed("cannot be made", folder))?;
        let probe = tempfile::Builder::new().prefix(HIDDEN).tempfile_in(folder);
        (probe.and_then(tempfile::NamedTempFile::close))
            .map_err(failed("cannot be written to", folder))?;
        for name in store.names()? {
            if name.starts_with(HIDDEN) {
                let path = folder.join(name);
                remove(&path).map_err(failed("cannot be removed", &path))?;
            }
        }
        Ok(store)
    }

    /// The store in a folder that is there, for those who only read.
    ///
    /// # Errors
    /// [`StoreError::Io`] if it cannot be read.
    pub fn existing(folder: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self {
            folder: folder.into(),
        };
        store.names()?;
        Ok(store)
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        names_in(&self.folder)
    }

    /// Where the checkpoint of a step is, or would be.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step:08}"))
    }

    /// The steps of which there is a checkpoint, in order.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, StoreError> {
        let step = |name: &String| {
            let step: u64 = name.strip_prefix(PREFIX)?.parse().ok()?;
            (*name == format!("{PREFIX}{step:08}")).then_some(step)
        };
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The last of them.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the folder cannot be read.
    pub fn latest(&self) -> Result<Option<u64>, StoreError> {
        Ok(self.steps()?.pop())
    }

    /// Removes the checkpoints of later steps, the last one first: a training that goes on from before them makes
    /// those steps again, and what it makes is the last there is.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn forget_after(&self, step: u64) -> Result<(), StoreError> {
        let later = self.steps()?.into_iter().rev();
        for step in later.take_while(|&later| later > step) {
            self.forget(step)?;
        }
        sync(&self.folder)
    }

    /// Removes a checkpoint: it loses its name before it loses its files.
    fn forget(&self, step: u64) -> Result<(), StoreError> {
        let (path, old) = (self.path(step), self.aside(step)?);
        fs::rename(&path, old.path().join("old")).map_err(failed("cannot be removed", &path))?;
        discard(old)
    }

    /// A hidden folder beside the checkpoints.
    fn aside(&self, step: u64) -> Result<TempDir, StoreError> {
        let made = tempfile::Builder::new()
            .prefix(&format!("{HIDDEN}{step:08}."))
            .tempdir_in(&self.folder);
        made.map_err(failed("cannot be written to", &self.folder))
    }

    /// Writes a checkpoint, and removes all but the `keep` last ones.
    ///
    /// # Errors
    /// [`StoreError::NotLast`] unless it is of a later step than all that are there
    /// ([`forget_after`](Self::forget_after)); others if a name is none or the system refuses, as when the disk is
    /// full. What was there before is there still.
    pub fn save<N: AsRef<str>>(
        &self,
        step: u64,
        files: &[(N, Vec<u8>)],
        keep: NonZeroUsize,
    ) -> Result<PathBuf, StoreError> {
        let mut digests = BTreeMap::new();
        for (name, bytes) in files {
            let name = name.as_ref();
            let rule = if name == SUMS {
                Some("it is the list's")
            } else if name.is_empty() || name.starts_with('.') {
                Some("it must be visible")
            } else if name.contains(['/', '\\', '\n', '\r', '\0']) {
                Some("it must be a plain name")
            } else if digests.insert(name, digest(bytes)).is_some() {
                Some("it is there twice")
            } else {
                None
            };
            if let Some(rule) = rule {
                return Err(StoreError::Name {
                    name: name.to_owned(),
                    rule,
                });
            }
        }
        if let Some(latest) = self.latest()?.filter(|&latest| latest >= step) {
            return Err(StoreError::NotLast {
                folder: self.folder.clone(),
                step,
                latest,
            });
        }
        let partial = self.aside(step)?;
        for (name, bytes) in files {
            write(&partial.path().join(name.as_ref()), bytes)?;
        }
        write(&partial.path().join(SUMS), render(&digests).as_bytes())?;
        sync(partial.path())?;

        let path = self.path(step);
        rename(partial, &path)?;
        sync(&self.folder)?;

        let steps = self.steps()?;
        for &step in &steps[..steps.len().saturating_sub(keep.get())] {
            self.forget(step)?;
        }
        Ok(path)
    }

    /// The checkpoint of a step.
    ///
    /// # Errors
    /// As [`Loaded::read`].
    pub fn load(&self, step: u64) -> Result<Loaded, StoreError> {
        Loaded::read(self.path(step))
    }
}

impl Loaded {
    /// Reads a checkpoint and holds every file against its digest.
    ///
    /// # Errors
    /// [`StoreError`] that says what is not as it was written.
    pub fn read(place: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let place = place.into();
        if !place.is_dir() {
            return Err(StoreError::Absent { place });
        }
        let sums = place.join(SUMS);
        if !sums.exists() {
            return Err(StoreError::NoCheckpoint { place });
        }
        let text = fs::read(&sums).map_err(failed("cannot be read", &sums))?;
        let digests = parse(&text, &place)?;
        let mut files = BTreeMap::new();
        for name in names_in(&place)? {
            if name != SUMS && !digests.contains_key(name.as_str()) {
                return Err(StoreError::Extra { place, name });
            }
        }
        for (name, expected) in &digests {
            let path = place.join(name);
            if !path.is_file() {
                return Err(StoreError::Missing {
                    place,
                    name: name.clone(),
                });
            }
            let bytes = fs::read(&path).map_err(failed("cannot be read", &path))?;
            let found = digest(&bytes);
            if found != *expected {
                return Err(StoreError::Damaged {
                    place,
                    name: name.clone(),
                    expected: expected.clone(),
                    found,
                });
            }
            files.insert(name.clone(), bytes);
        }
        Ok(Self { place, files })
    }

    /// Where it is.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// A file's bytes.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is none of that name.
    pub fn get(&self, name: &str) -> Result<&[u8], StoreError> {
        let missing = || StoreError::Missing {
            place: self.place.clone(),
            name: name.to_owned(),
        };
        Ok(self.files.get(name).ok_or_else(missing)?)
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>, StoreError> {
    let unreadable = || failed("cannot be read", folder);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable())? {
        let entry = entry.map_err(unreadable())?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// The SHA-256 of some bytes, as `sha256sum` writes it.
pub fn digest(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn render<N: AsRef<str>>(digests: &BTreeMap<N, String>) -> String {
    let line = |(name, digest): (&N, &String)| format!("{digest}  {}\n", name.as_ref());
    digests.iter().map(line).collect()
}

/// The digests by name. What [`render`] would not write again in just these bytes was not written by it.
fn parse(text: &[u8], place: &Path) -> Result<BTreeMap<String, String>, StoreError> {
    let mut digests = BTreeMap::new();
    let whole = String::from_utf8_lossy(text);
    for line in whole.split_terminator('\n') {
        if let Some((digest, name)) = line.split_once("  ") {
            let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            if digest.len() == 64 && digest.bytes().all(is_hex) {
                digests.insert(name.to_owned(), digest.to_owned());
            }
        }
    }
    let again = render(&digests);
    if again.as_bytes() == text {
        return Ok(digests);
    }
    let (found, again) = (text.split(|&byte| byte == b'\n'), again.split('\n'));
    let same = found
        .zip(again)
        .take_while(|(found, again)| *found == again.as_bytes());
    Err(StoreError::Sums {
        place: place.to_owned(),
        line: same.count() + 1,
    })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let written = File::create_new(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(failed("cannot be written", path))
}

/// Makes a folder's entries last, where the file system can do that.
fn sync(folder: &Path) -> Result<(), StoreError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    match synced {
        Err(error) if !is_incapable(error.kind()) => {
            Err(failed("cannot be written to", folder)(error))
        }
        _ => Ok(()),
    }
}

/// Whether an error says that a folder cannot be synced here at all, and not that it was not.
fn is_incapable(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    match kind {
        Unsupported | InvalidInput => true,
        // Windows opens no folders.
        PermissionDenied => cfg!(windows),
        _ => false,
    }
}

fn rename(partial: TempDir, path: &Path) -> Result<(), StoreError> {
    fs::rename(partial.path(), path).map_err(failed("cannot be put in its place", path))?;
    // It has left its hidden name: there is nothing to remove.
    let _ = partial.keep();
    Ok(())
}

fn discard(old: TempDir) -> Result<(), StoreError> {
    let path = old.path().to_owned();
    old.close().map_err(failed("cannot be removed", &path))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: NonZeroUsize = NonZeroUsize::new(2).unwrap();

    fn files(step: u64) -> [(&'static str, Vec<u8>); 2] {
        [
            ("weights", vec![step as u8; 100]),
            ("manifest", b"{}".to_vec()),
        ]
    }

    #[test]
    fn the_last_checkpoints_are_kept_and_come_back_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("new/checkpoints")).unwrap();
        assert_eq!(store.latest().unwrap(), None);
        for step in [3, 7, 10, 200] {
            store.save(step, &files(step), KEEP).unwrap();
        }
        assert_eq!(store.steps().unwrap(), [10, 200]);
        assert_eq!(store.latest().unwrap(), Some(200));
        assert_eq!(store.load(10).unwrap().get("weights").unwrap(), [10; 100]);
        let error = store.load(3).unwrap_err().to_string();
        assert!(
            error.contains("step-00000003: there is no checkpoint"),
            "{error}"
        );
    }

    #[test]
    fn what_is_written_is_the_last_one_once_the_later_ones_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        for step in [200, 300, 400] {
            store.save(step, &files(step), NonZeroUsize::MAX).unwrap();
        }
        // It would be the first to be removed, and the old ones the first to be gone on from.
        for step in [250, 400] {
            let error = store.save(step, &files(9), KEEP).unwrap_err().to_string();
            assert!(error.contains("has the checkpoint of step 400"), "{error}");
            assert_eq!(store.steps().unwrap(), [200, 300, 400]);
        }
        store.forget_after(200).unwrap();
        assert_eq!(store.steps().unwrap(), [200]);
        store.save(250, &files(9), KEEP).unwrap();
        assert_eq!(store.steps().unwrap(), [200, 250]);
        store.forget_after(250).unwrap();
        assert_eq!(store.latest().unwrap(), Some(250));
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 2, "what was forgotten left something behind");
    }

    #[test]
    fn only_a_file_system_that_cannot_sync_folders_need_not() {
        use io::ErrorKind::{InvalidInput, Other, StorageFull, Unsupported};
        assert!([Unsupported, InvalidInput].into_iter().all(is_incapable));
        // As when a disk is lost: EIO.
        let lost = io::Error::from_raw_os_error(5).kind();
        assert!(![lost, Other, StorageFull].into_iter().any(is_incapable));
        let folder = tempfile::tempdir().unwrap();
        sync(folder.path()).unwrap();
        let gone = sync(&folder.path().join("gone")).unwrap_err().to_string();
        assert!(gone.contains("gone: cannot be written to"), "{gone}");
    }

    #[test]
    fn what_a_writer_left_behind_is_no_checkpoint_and_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.save(1, &files(1), KEEP).unwrap();
        let partial = folder.path().join(".step-00000002.abc");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("weights"), b"half").unwrap();
        assert_eq!(store.steps().unwrap(), [1]);
        Store::open(folder.path()).unwrap();
        assert!(!partial.exists());
        assert!(store.load(1).is_ok());
    }

    #[test]
    fn every_flipped_bit_of_every_file_is_found_and_the_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let path = store.save(5, &files(5), KEEP).unwrap();
        for name in ["weights", "manifest", SUMS] {
            let file = path.join(name);
            let good = fs::read(&file).unwrap();
            for bit in 0..8 * good.len() {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                fs::write(&file, &bad).unwrap();
                match store.load(5).unwrap_err() {
                    StoreError::Damaged { name: found, .. } => {
                        assert!(found == name || name == SUMS, "{found} instead of {name}");
                    }
                    // A digest or a name in the list is another one now.
                    StoreError::Sums { .. }
                    | StoreError::Missing { .. }
                    | StoreError::Extra { .. } => {
                        assert_eq!(name, SUMS);
                    }
                    other => panic!("bit {bit} of {name}: {other}"),
                }
            }
            // Nor is one that was cut off.
            fs::write(&file, &good[..good.len() - 1]).unwrap();
            assert!(store.load(5).is_err(), "{name} was cut off");
            fs::write(&file, &good).unwrap();
        }
        assert!(store.load(5).is_ok());
    }

    #[test]
    fn a_file_too_many_or_too_few_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let path = store.save(5, &files(5), KEEP).unwrap();
        fs::write(path.join("more"), b"").unwrap();
        let error = store.load(5).unwrap_err().to_string();
        assert!(
            error.contains("holds more, which SHA256SUMS does not list"),
            "{error}"
        );
        fs::remove_file(path.join("more")).unwrap();
        fs::remove_file(path.join("weights")).unwrap();
        let error = store.load(5).unwrap_err().to_string();
        assert!(error.contains("lacks the file weights"), "{error}");
        fs::remove_file(path.join(SUMS)).unwrap();
        let error = store.load(5).unwrap_err().to_string();
        assert!(error.contains("this is no checkpoint"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_and_a_name_that_is_none_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = Store::open(file.join("checkpoints"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("file/checkpoints: cannot be made"),
            "{error}"
        );
        let store = Store::open(folder.path().join("store")).unwrap();
        for name in [SUMS, "", ".hidden", "../up", "a\nb"] {
            let error = store.save(1, &[(name, vec![])], KEEP).unwrap_err();
            assert!(matches!(error, StoreError::Name { .. }), "{error}");
        }
        let twice = [("a", vec![]), ("a", vec![])];
        assert!(store.save(1, &twice, KEEP).is_err());
        assert_eq!(store.latest().unwrap(), None);
    }
}
