//! NCCL's library, found when it is needed, and its functions: the foreign part of this transport.
//!
//! Bindings that load a library themselves look for `libnccl.so` and panic where it is called otherwise, as
//! NVIDIA's own packages call it (`libnccl.so.2`). Here the name is looked for first that they give it, a
//! missing library or function is an error that says what to do, and what a function returns is a number
//! until it is known to be one of NCCL's.
//!
//! Types are those of `cudarc`'s bindings.
//!
//! Unsafe here: what the library's functions are, and that they are called as NCCL's header says. Whose memory and
//! whose communicator they are called with is `communicator.rs`'s word.
#![expect(unsafe_code, reason = "NCCL's C functions, loaded by name")]

use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclUniqueId};

use super::NcclError;
use super::communicator::Message;

/// NCCL's own names for its library, the one with its version first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The first version with communicators that do not block and configurations as they are used here: 2.18.
pub(super) const OLDEST: c_int = 21_800;

/// The success of a call.
pub(super) const SUCCESS: u32 = 0;
/// A call of a communicator that does not block has begun.
pub(super) const IN_PROGRESS: u32 = 7;

macro_rules! functions {
    ($($field:ident: $name:literal = fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used, by their names in NCCL's manual.
        #[allow(missing_docs, reason = "the manual is NCCL's")]
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn of(library: &libloading::Library, path: &str) -> Result<Self, NcclError> {
                Ok(Self {
                    $($field: {
                        let name = concat!($name, "\0").as_bytes();
                        // SAFETY: NCCL's headers declare the function with this signature, and have since
                        // version 2.18; the pointer is used while `library` is loaded only, which lives
                        // beside it in `Library`.
                        let symbol = unsafe { library.get(name) };
                        *symbol.map_err(|error: libloading::Error| NcclError::Function {
                            name: $name,
                            path: path.to_owned(),
                            message: error.to_string(),
                        })?
                    },)*
                })
            }
        }
    };
}

functions! {
    get_version: "ncclGetVersion" = fn(*mut c_int) -> u32;
    get_unique_id: "ncclGetUniqueId" = fn(*mut ncclUniqueId) -> u32;
    get_error_string: "ncclGetErrorString" = fn(u32) -> *const c_char;
    get_last_error: "ncclGetLastError" = fn(ncclComm_t) -> *const c_char;
    comm_init_rank_config: "ncclCommInitRankConfig" =
        fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> u32;
    comm_get_async_error: "ncclCommGetAsyncError" = fn(ncclComm_t, *mut u32) -> u32;
    comm_abort: "ncclCommAbort" = fn(ncclComm_t) -> u32;
    comm_finalize: "ncclCommFinalize" = fn(ncclComm_t) -> u32;
    comm_destroy: "ncclCommDestroy" = fn(ncclComm_t) -> u32;
    group_start: "ncclGroupStart" = fn() -> u32;
    group_end: "ncclGroupEnd" = fn() -> u32;
    send: "ncclSend" =
        fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> u32;
    recv: "ncclRecv" =
        fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> u32;
}

/// NCCL, loaded.
pub(super) struct Library {
    functions: Functions,
    path: String,
    version: c_int,
    /// Last, so that it is unloaded last.
    _library: libloading::Library,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library({}, version {})", self.path, self.version)
    }
}

impl Library {
    /// Loads NCCL: from `place`, a file or the folder that it lies in, or where the system looks for libraries.
    ///
    /// # Errors
    /// [`NcclError::Library`] if there is none, [`NcclError::Function`] or [`NcclError::TooOld`] if it is another
    /// one than this transport needs.
    pub(super) fn load(place: Option<&Path>) -> Result<Arc<Self>, NcclError> {
        let candidates: Vec<OsString> = match place {
            Some(folder) if folder.is_dir() => {
                NAMES.map(|name| folder.join(name).into_os_string()).into()
            }
            Some(file) => vec![file.as_os_str().to_owned()],
            None => NAMES.map(OsString::from).into(),
        };
        let mut reasons = Vec::new();
        for candidate in &candidates {
            // SAFETY: the library is NCCL's by its name, or the caller's word; its initialisers only set up
            // its own state.
            match unsafe { libloading::Library::new(candidate) } {
                Ok(library) => {
                    return Self::of(library, candidate.to_string_lossy().into_owned());
                }
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    let cause = cause.unwrap_or_else(|| error.to_string());
                    reasons.push(format!("{}: {cause}", candidate.to_string_lossy()));
                }
            }
        }
        Err(NcclError::Library { reasons })
    }

    fn of(library: libloading::Library, path: String) -> Result<Arc<Self>, NcclError> {
        let functions = Functions::of(&library, &path)?;
        let mut version = 0;
        // SAFETY: the pointer is to an int of ours.
        let result = unsafe { (functions.get_version)(&raw mut version) };
        if result != SUCCESS || version < OLDEST {
            return Err(NcclError::TooOld {
                path,
                found: version,
                needed: OLDEST,
            });
        }
        Ok(Arc::new(Self {
            functions,
            path,
            version,
            _library: library,
        }))
    }

    /// A new name for ranks to join under.
    pub(super) fn unique_id(&self) -> Result<ncclUniqueId, NcclError> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: the pointer is to an identifier of ours.
        let result = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", result, std::ptr::null_mut())?;
        Ok(id)
    }

    /// Begins to join: the communicator is not ready before [`async_error`](Self::async_error) says success.
    ///
    /// # Safety
    /// The calling thread's current CUDA context is that of the rank's device.
    pub(super) unsafe fn comm_init(
        &self,
        (rank, ranks): (usize, usize),
        id: ncclUniqueId,
        config: &mut ncclConfig_t,
    ) -> Result<ncclComm_t, NcclError> {
        let mut comm: ncclComm_t = std::ptr::null_mut();
        let ranks = int(ranks)?;
        let rank = int(rank)?;
        // SAFETY: the pointers are to values of ours, the identifier and the configuration are whole.
        let result = unsafe {
            (self.functions.comm_init_rank_config)(&raw mut comm, ranks, id, rank, config)
        };
        self.check("ncclCommInitRankConfig", result, comm)?;
        Ok(comm)
    }

    /// What has become of the calls so far: [`SUCCESS`], [`IN_PROGRESS`], or the error.
    ///
    /// # Safety
    /// `comm` was made by [`comm_init`](Self::comm_init) and neither aborted nor destroyed.
    pub(super) unsafe fn async_error(&self, comm: ncclComm_t) -> Result<u32, NcclError> {
        let mut state = IN_PROGRESS;
        // SAFETY: by the caller's word, and the pointer is to a number of ours.
        let result = unsafe { (self.functions.comm_get_async_error)(comm, &raw mut state) };
        self.check("ncclCommGetAsyncError", result, comm)?;
        self.check("an earlier call", state, comm)?;
        Ok(state)
    }

    /// # Safety
    /// As [`async_error`](Self::async_error); the communicator is gone afterwards.
    pub(super) unsafe fn abort(&self, comm: ncclComm_t) {
        // SAFETY: by the caller's word. Whatever it says, the communicator is given up.
        let _ = unsafe { (self.functions.comm_abort)(comm) };
    }

    /// Begins to flush what is under way; ready when [`async_error`](Self::async_error) says success.
    ///
    /// # Safety
    /// As [`async_error`](Self::async_error).
    pub(super) unsafe fn finalize(&self, comm: ncclComm_t) -> Result<(), NcclError> {
        // SAFETY: by the caller's word.
        let result = unsafe { (self.functions.comm_finalize)(comm) };
        self.check("ncclCommFinalize", result, comm)
    }

    /// # Safety
    /// As [`async_error`](Self::async_error), after a finished [`finalize`](Self::finalize); the communicator is
    /// gone afterwards.
    pub(super) unsafe fn destroy(&self, comm: ncclComm_t) -> Result<(), NcclError> {
        // SAFETY: by the caller's word.
        let result = unsafe { (self.functions.comm_destroy)(comm) };
        self.check("ncclCommDestroy", result, std::ptr::null_mut())
    }

    /// Begins to send and receive bytes, all at once: none of them waits for another.
    ///
    /// # Safety
    /// `comm` and `stream` are alive and of one device, each message's memory lies on it, is as long as it says
    /// and stays so, unread where it is received and unwritten where it is sent, until the stream has passed.
    pub(super) unsafe fn exchange(
        &self,
        comm: ncclComm_t,
        stream: cudaStream_t,
        sends: &[Message],
        receives: &[Message],
    ) -> Result<(), NcclError> {
        let bytes = ncclDataType_t::ncclUint8;
        // SAFETY: it takes no arguments; each group that is started is ended below, also after an error.
        let started = unsafe { (self.functions.group_start)() };
        self.check("ncclGroupStart", started, comm)?;
        let mut outcome = Ok(());
        for message in receives {
            // SAFETY: by the caller's word.
            let result = unsafe {
                let address = message.address as *mut c_void;
                (self.functions.recv)(address, message.bytes, bytes, message.peer, comm, stream)
            };
            outcome = outcome.and(self.check("ncclRecv", result, comm));
        }
        for message in sends {
            // SAFETY: by the caller's word.
            let result = unsafe {
                let address = message.address as *const c_void;
                (self.functions.send)(address, message.bytes, bytes, message.peer, comm, stream)
            };
            outcome = outcome.and_then(|()| self.check("ncclSend", result, comm));
        }
        // SAFETY: as above.
        let ended = unsafe { (self.functions.group_end)() };
        outcome.and_then(|()| self.check("ncclGroupEnd", ended, comm))
    }

    /// Success and progress are none.
    fn check(&self, call: &'static str, result: u32, comm: ncclComm_t) -> Result<(), NcclError> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return strings of the library's own that end in a zero, or null; neither looks into
        // the communicator (it is for later use, says the manual).
        let texts = unsafe {
            [
                (self.functions.get_error_string)(result),
                (self.functions.get_last_error)(comm),
            ]
            .map(|text| match text.is_null() {
                true => String::new(),
                false => CStr::from_ptr(text).to_string_lossy().into_owned(),
            })
        };
        let [kind, last] = texts;
        let message = match last.is_empty() {
            true => kind,
            false => format!("{kind}: {last}"),
        };
        Err(NcclError::Call { call, message })
    }
}

/// A rank as NCCL numbers it.
pub(super) fn int(number: usize) -> Result<c_int, NcclError> {
    c_int::try_from(number).map_err(|_| NcclError::Call {
        call: "a rank",
        message: format!("{number} is more than NCCL can number"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_the_library_says_what_was_looked_for_and_what_to_do() {
        let folder = std::env::temp_dir();
        let error = Library::load(Some(&folder)).unwrap_err();
        let NcclError::Library { reasons } = &error else {
            panic!("{error}");
        };
        assert_eq!(reasons.len(), NAMES.len());
        let message = error.to_string();
        assert!(message.contains("libnccl.so.2"), "{message}");
        assert!(message.contains("LD_LIBRARY_PATH"), "{message}");
    }

    #[test]
    fn another_library_under_that_name_is_refused_by_the_function_that_it_lacks() {
        // The C library is everywhere, and has none of NCCL's functions.
        let error = Library::load(Some(Path::new("libc.so.6"))).unwrap_err();
        let NcclError::Function { name, path, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!((*name, path.as_str()), ("ncclGetVersion", "libc.so.6"));
    }
}
