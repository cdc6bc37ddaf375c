//! Where the ranks compute: what `--device` chooses.
//!
//! ```text
//! flex          the processor
//! wgpu          the system's graphics processor, through Vulkan, Metal or DirectX    feature `wgpu`
//! cuda          NVIDIA's first                                                       feature `cuda`
//! cuda:0,2      the first and the third: ranks take them in turn                     feature `cuda`
//! ```
//!
//! A [`DeviceChoice`] is what was written; opened, it gives [`Devices`] that are there and have computed something.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use burn::tensor::DeviceType;
use burn::tensor::{DType, Device, Tensor};
use dsp_core::Engine;
use serde::{Deserialize, Serialize};

/// The devices of a run, by name: on the command line, and in a run's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceChoice(Backend);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Backend {
    /// The processor.
    #[default]
    Flex,
    /// The system's graphics processor.
    Wgpu,
    /// NVIDIA's graphics processors, by number; at least one.
    Cuda(Vec<usize>),
}

/// Why no run is possible there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No such name.
    #[error(
        "the device `{0}` is unknown; there are flex, wgpu, cuda, cuda:0 and so on, cuda:0,1 and so on"
    )]
    Unknown(String),
    /// A known name, of a backend that was left out of this program.
    #[error("this program was built without `{0}`: build it with --features {0}")]
    NotBuilt(&'static str),
    /// The device, or its driver, is missing or does not work.
    #[error("the device {device} cannot be used: {message}")]
    Unusable {
        /// Which.
        device: String,
        /// What its backend says.
        message: String,
    },
    /// It has no numbers of this type.
    #[error(
        "the device {device} has no {dtype:?}: choose another type of floats, or the device flex"
    )]
    Dtype {
        /// Which.
        device: String,
        /// The type.
        dtype: DType,
    },
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(name.to_owned());
        let backend = match name.split_once(':').unwrap_or((name, "")) {
            _ if name.ends_with(':') => return Err(unknown()),
            ("flex", "") => Backend::Flex,
            ("wgpu", "") => Backend::Wgpu,
            ("cuda", "") => Backend::Cuda(vec![0]),
            ("cuda", numbers) => {
                let numbers: Result<_, _> = numbers.split(',').map(str::parse).collect();
                Backend::Cuda(numbers.map_err(|_| unknown())?)
            }
            _ => return Err(unknown()),
        };
        Ok(Self(backend))
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = DeviceError;

    fn try_from(name: String) -> Result<Self, DeviceError> {
        name.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Backend::Flex => f.write_str("flex"),
            Backend::Wgpu => f.write_str("wgpu"),
            Backend::Cuda(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
        }
    }
}

impl DeviceChoice {
    /// Opens each device and computes something of the given type on it. An engine that moves tensors of one device
    /// only has chosen it already.
    ///
    /// # Errors
    /// [`DeviceError`] if the backend was not built, or a device is missing, does not work, or does not have the
    /// type.
    pub fn open(&self, engine: &Engine, dtype: DType) -> Result<Devices, DeviceError> {
        let all = match engine.device() {
            Some(device) => vec![("this rank's GPU".to_owned(), device)],
            None => self.all()?,
        };
        for (name, device) in &all {
            check(name, device, dtype)?;
        }
        Ok(Devices {
            choice: self.clone(),
            all: all.into_iter().map(|(_, device)| device).collect(),
        })
    }

    /// The devices, each with its name: they are there, and not opened yet.
    fn all(&self) -> Result<Vec<(String, Device)>, DeviceError> {
        match &self.0 {
            Backend::Flex => Ok(vec![("flex".to_owned(), Device::flex())]),
            #[cfg(feature = "wgpu")]
            Backend::Wgpu => {
                // Asked for one where there is none, Burn panics in a thread of its own.
                if Device::enumerate(DeviceType::Wgpu).is_empty() {
                    return Err(DeviceError::Unusable {
                        device: "wgpu".to_owned(),
                        message: "no driver of this machine names a device".to_owned(),
                    });
                }
                let device = Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
                Ok(vec![("wgpu".to_owned(), device)])
            }
            #[cfg(not(feature = "wgpu"))]
            Backend::Wgpu => Err(DeviceError::NotBuilt("wgpu")),
            #[cfg(feature = "cuda")]
            Backend::Cuda(numbers) => {
                let count = Device::enumerate(DeviceType::Cuda).len();
                let device = |&number: &usize| {
                    let name = format!("cuda:{number}");
                    match number < count {
                        true => Ok((name, Device::cuda(number))),
                        false => Err(DeviceError::Unusable {
                            device: name,
                            message: format!("this machine shows {count} of NVIDIA's devices"),
                        }),
                    }
                };
                numbers.iter().map(device).collect()
            }
            #[cfg(not(feature = "cuda"))]
            Backend::Cuda(_) => Err(DeviceError::NotBuilt("cuda")),
        }
    }
}

fn check(name: &str, device: &Device, dtype: DType) -> Result<(), DeviceError> {
    let name = || name.to_owned();
    let unusable = |message| DeviceError::Unusable {
        device: name(),
        message,
    };
    // A backend that finds no device says so by a panic.
    let answer = catch_unwind(AssertUnwindSafe(|| {
        device.supports_dtype(dtype).then(|| {
            let two = Tensor::<1>::ones([2], (device, dtype)).sum();
            two.into_scalar::<f64>()
        })
    }));
    match answer {
        Ok(Some(2.0)) => Ok(()),
        Ok(Some(other)) => Err(unusable(format!("it gave {other} for 1 + 1"))),
        Ok(None) => Err(DeviceError::Dtype {
            device: name(),
            dtype,
        }),
        Err(payload) => Err(unusable(message(&*payload))),
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(message), _) => (*message).to_owned(),
        (_, Some(message)) => message.clone(),
        _ => "it panicked".to_owned(),
    }
}

/// The devices of a run, which ranks take in turn. By default the processor.
#[derive(Debug, Clone)]
pub struct Devices {
    choice: DeviceChoice,
    /// At least one.
    all: Vec<Device>,
}

impl Default for Devices {
    fn default() -> Self {
        Self {
            choice: DeviceChoice::default(),
            all: vec![Device::flex()],
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.choice.fmt(f)
    }
}

impl Devices {
    /// Where a rank computes.
    pub fn of_rank(&self, rank: usize) -> Device {
        self.all[rank % self.all.len()].clone()
    }

    /// How many GPUs all ranks have together; none where they compute on the processor.
    pub fn gpus(&self, engine: &Engine) -> Option<usize> {
        match (engine.device(), &self.choice.0) {
            (Some(_), _) => Some(engine.most_ranks()),
            (None, Backend::Flex) => None,
            (None, Backend::Wgpu) => Some(1),
            (None, Backend::Cuda(numbers)) => Some(BTreeSet::from_iter(numbers).len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(name: &str) -> DeviceChoice {
        name.parse().unwrap()
    }

    #[test]
    fn the_processor_is_there_in_both_precisions() {
        assert_eq!(choice("flex"), DeviceChoice::default());
        for dtype in [DType::F32, DType::F64] {
            let devices = choice("flex").open(&Engine::Threads, dtype).unwrap();
            assert_eq!(devices.of_rank(3), Device::flex());
        }
    }

    #[test]
    fn a_name_is_written_as_it_is_read() {
        for name in ["flex", "wgpu", "cuda:0", "cuda:1,3"] {
            assert_eq!(choice(name).to_string(), name);
        }
        assert_eq!(choice("cuda"), choice("cuda:0"));
    }

    #[test]
    fn a_name_that_means_nothing_is_refused_with_those_that_do() {
        for name in [
            "gpu", "flex:1", "flex:", "wgpu:0", "cuda:", "cuda:x", "cuda:0,", "",
        ] {
            let error = name.parse::<DeviceChoice>().unwrap_err();
            assert_eq!(error, DeviceError::Unknown(name.to_owned()));
            assert!(error.to_string().contains("cuda:0,1"), "{error}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_backend_that_was_left_out_says_how_to_have_it() {
        let error = choice("cuda:0")
            .open(&Engine::Threads, DType::F32)
            .unwrap_err();
        assert!(error.to_string().contains("--features cuda"), "{error}");
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn a_type_that_the_device_lacks_is_refused_before_any_work() {
        let device = choice("wgpu")
            .open(&Engine::Threads, DType::F32)
            .unwrap()
            .of_rank(0);
        let types = [DType::BF16, DType::F16, DType::F64];
        for dtype in types
            .into_iter()
            .filter(|&dtype| !device.supports_dtype(dtype))
        {
            let error = choice("wgpu")
                .open(&Engine::Threads, dtype)
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("wgpu has no {dtype:?}")), "{error}");
        }
    }

    #[test]
    fn ranks_take_several_devices_in_turn() {
        let all = [false, true].map(|autodiff| match autodiff {
            true => Device::flex().autodiff(),
            false => Device::flex(),
        });
        let devices = Devices {
            all: all.to_vec(),
            ..Devices::default()
        };
        let of_rank = (0..5).map(|rank| devices.of_rank(rank).is_autodiff());
        assert!(of_rank.eq([false, true, false, true, false]));
    }
}
