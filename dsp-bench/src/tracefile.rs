//! The trace of a comparison, for <https://ui.perfetto.dev>: spans of compute, communication and
//! waiting, one track for each rank.
//!
//! The spans come from the other crates (`tracing`, targets that begin with `dsp`); a track is named
//! after its thread. Every launch of ranks starts new threads, so [`TraceFile::finish`] lays threads
//! of one name that follow each other in time onto one track.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde_json::{Value, json};
use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::filter::dynamic_filter_fn;
use tracing_subscriber::prelude::*;

/// A trace that is being written; a process can have one.
///
/// Only [`TraceFile::finish`] makes it: what was recorded so far stands beside it, in `….partial`.
pub struct TraceFile {
    path: PathBuf,
    /// Beside it, where the spans go first: an earlier trace stays until this one is whole.
    partial: PathBuf,
    recording: Arc<AtomicBool>,
    guard: FlushGuard,
}

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file cannot be made or written.
    #[error("trace {}: {source}; name a file in a folder that can be written", path.display())]
    Unwritable {
        /// The trace's file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What was written is not whole, as on a full disk.
    #[error("trace {}: not whole ({source}); see whether the disk is full", path.display())]
    Malformed {
        /// The trace's file.
        path: PathBuf,
        /// Where it ends or breaks.
        source: serde_json::Error,
    },
    /// Spans already go elsewhere.
    #[error("trace {}: the process already has a subscriber for its spans; start the trace once, and first", path.display())]
    AlreadyStarted {
        /// The trace's file.
        path: PathBuf,
    },
}

impl TraceFile {
    /// Records from now on the spans of all threads into a new file at `path`.
    ///
    /// # Errors
    /// [`TraceError::Unwritable`], and [`TraceError::AlreadyStarted`] if the process has a subscriber.
    pub fn start(path: &Path) -> Result<Self, TraceError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial).map_err(|source| TraceError::Unwritable {
            path: path.to_owned(),
            source,
        })?;
        let (layer, guard) = ChromeLayerBuilder::new()
            .writer(file)
            .include_args(true)
            .include_locations(false)
            .build();
        let recording = Arc::new(AtomicBool::new(true));
        let on = Arc::clone(&recording);
        let ours = dynamic_filter_fn(move |metadata, _| {
            metadata.target().starts_with("dsp") && on.load(Relaxed)
        });
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(ours));
        tracing::subscriber::set_global_default(subscriber).map_err(|_| {
            // It is new and empty; whether it goes changes nothing for the caller.
            let _ = fs::remove_file(&partial);
            TraceError::AlreadyStarted {
                path: path.to_owned(),
            }
        })?;
        Ok(Self {
            path: path.to_owned(),
            partial,
            recording,
            guard,
        })
    }

    /// Records spans that begin from now on, or leaves them out.
    pub fn set_recording(&self, recording: bool) {
        self.recording.store(recording, Relaxed);
    }

    /// Ends the trace, gives it its tracks, and returns its path.
    ///
    /// # Errors
    /// [`TraceError::Unwritable`] and [`TraceError::Malformed`] if writing failed.
    pub fn finish(self) -> Result<PathBuf, TraceError> {
        let Self {
            path,
            partial,
            recording,
            guard,
        } = self;
        recording.store(false, Relaxed);
        drop(guard);
        let unwritable = |source| TraceError::Unwritable {
            path: path.clone(),
            source,
        };
        let malformed = |source| TraceError::Malformed {
            path: path.clone(),
            source,
        };
        let bytes = fs::read(&partial).map_err(unwritable)?;
        let events: Vec<Value> = serde_json::from_slice(&bytes).map_err(malformed)?;
        let text = serde_json::to_vec(&with_tracks(events)).map_err(malformed)?;
        fs::write(&path, text).map_err(unwritable)?;
        fs::remove_file(&partial).map_err(unwritable)?;
        Ok(path)
    }
}

impl std::fmt::Debug for TraceFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TraceFile")
            .field("path", &self.path)
            .field("recording", &self.recording)
            .finish_non_exhaustive()
    }
}

/// A thread's events in time.
struct Thread {
    name: String,
    id: u64,
    first: f64,
    last: f64,
}

/// The same events, those of threads that have one name and follow each other on one track; tracks in
/// the order of their names, numbers in them by value.
fn with_tracks(mut events: Vec<Value>) -> Vec<Value> {
    let mut threads: BTreeMap<u64, Thread> = BTreeMap::new();
    for event in &events {
        let Some(id) = event["tid"].as_u64() else {
            continue;
        };
        let thread = threads.entry(id).or_insert_with(|| Thread {
            name: format!("thread {id}"),
            id,
            first: f64::INFINITY,
            last: f64::NEG_INFINITY,
        });
        if let Some(name) = event["args"]["name"]
            .as_str()
            .filter(|_| event["ph"] == "M")
        {
            thread.name = name.to_owned();
        }
        if let Some(time) = event["ts"].as_f64() {
            thread.first = thread.first.min(time);
            thread.last = thread.last.max(time);
        }
    }

    let mut threads: Vec<Thread> = threads.into_values().collect();
    threads.sort_by(|a, b| a.first.total_cmp(&b.first).then(a.id.cmp(&b.id)));
    let mut tracks: Vec<Thread> = Vec::new();
    let mut track_of: BTreeMap<u64, u64> = BTreeMap::new();
    for thread in threads {
        let free = tracks
            .iter_mut()
            .find(|track| track.name == thread.name && track.last <= thread.first);
        match free {
            Some(track) => {
                track_of.insert(thread.id, track.id);
                track.last = track.last.max(thread.last);
            }
            None => {
                track_of.insert(thread.id, thread.id);
                tracks.push(thread);
            }
        }
    }

    events.retain(|event| event["ph"] != "M");
    for event in &mut events {
        if let Some(track) = event["tid"].as_u64().and_then(|id| track_of.get(&id)) {
            event["tid"] = json!(track);
        }
    }
    tracks.sort_by_cached_key(|track| (natural(&track.name), track.id));
    let metadata = |name: &str, id: u64, args: Value| json!({ "ph": "M", "pid": 1, "tid": id, "name": name, "args": args });
    let mut named = vec![metadata(
        "process_name",
        0,
        json!({ "name": "dsp compare" }),
    )];
    for (position, track) in tracks.iter().enumerate() {
        named.push(metadata(
            "thread_name",
            track.id,
            json!({ "name": track.name }),
        ));
        named.push(metadata(
            "thread_sort_index",
            track.id,
            json!({ "sort_index": position }),
        ));
    }
    named.append(&mut events);
    named
}

/// A key that puts `rank 2` before `rank 10`.
fn natural(name: &str) -> (String, u64) {
    let text = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (text.to_owned(), name[text.len()..].parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_has_one_track_over_several_launches_and_foreign_spans_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = TraceFile::start(&path).unwrap();
        let launch = || {
            std::thread::scope(|scope| {
                for rank in [10, 2] {
                    std::thread::Builder::new()
                        .name(format!("rank {rank}"))
                        .spawn_scoped(scope, move || {
                            let _span =
                                tracing::info_span!(target: "dsp_core", "switch", bytes = 7)
                                    .entered();
                            let _other =
                                tracing::info_span!(target: "elsewhere", "noise").entered();
                            std::thread::sleep(std::time::Duration::from_millis(2));
                        })
                        .unwrap();
                }
            });
        };
        launch();
        launch();
        trace.set_recording(false);
        launch();
        assert!(matches!(
            TraceFile::start(&folder.path().join("second.json")),
            Err(TraceError::AlreadyStarted { .. })
        ));
        assert!(!path.exists(), "not before it is whole");
        let written = trace.finish().unwrap();
        let files = std::fs::read_dir(folder.path()).unwrap();
        assert_eq!(files.count(), 1);
        let events: Vec<Value> = serde_json::from_slice(&std::fs::read(written).unwrap()).unwrap();

        let tracks: Vec<&str> = events
            .iter()
            .filter(|e| e["name"] == "thread_name")
            .map(|e| e["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(tracks, ["rank 2", "rank 10"]);
        let begun: Vec<&Value> = events.iter().filter(|e| e["ph"] == "B").collect();
        assert_eq!(begun.len(), 4);
        assert!(begun.iter().all(|e| e["name"] == "switch"));
        assert!(
            begun
                .iter()
                .all(|e| e["args"]["bytes"] == "7" || e["args"]["bytes"] == 7)
        );
        let ends = events.iter().filter(|e| e["ph"] == "E").count();
        assert_eq!(ends, 4);
    }

    #[test]
    fn threads_of_one_name_that_overlap_keep_their_own_tracks() {
        let named = |id| json!({ "ph": "M", "pid": 1, "name": "thread_name", "tid": id, "args": { "name": "worker" } });
        let at = |id, ph, ts| json!({ "ph": ph, "pid": 1, "name": "x", "tid": id, "ts": ts });
        let events = with_tracks(vec![
            named(0),
            at(0, "B", 0.0),
            named(1),
            at(1, "B", 5.0),
            at(0, "E", 9.0),
            at(1, "E", 12.0),
            named(2),
            at(2, "B", 10.0),
            at(2, "E", 11.0),
        ]);
        let tracks = events.iter().filter(|e| e["name"] == "thread_name").count();
        assert_eq!(tracks, 2);
        assert_eq!(events.last().unwrap()["tid"], 0);
    }

    #[test]
    fn a_trace_in_no_folder_is_an_error_that_names_it() {
        let error = TraceFile::start(Path::new("no/such/folder/trace.json")).unwrap_err();
        assert!(error.to_string().contains("no/such/folder"), "{error}");
    }
}
