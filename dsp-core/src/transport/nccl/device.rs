//! A rank's GPU, if there is one.
#![expect(
    unsafe_code,
    reason = "whether the driver is there is asked by loading it"
)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, sys};

use super::NcclError;

/// The context of the device of this number, the one that CubeCL uses too.
pub(super) fn context(device: usize) -> Result<Arc<CudaContext>, NcclError> {
    // SAFETY: only looks whether the driver's library can be loaded. The calls below would panic without it.
    if !unsafe { sys::is_culib_present() } {
        return Err(NcclError::Driver);
    }
    let devices = usize::try_from(CudaContext::device_count()?).unwrap_or(0);
    if device >= devices {
        return Err(NcclError::Device { device, devices });
    }
    Ok(CudaContext::new(device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_an_error_and_no_panic() {
        let error = context(1000).unwrap_err();
        let expected = matches!(
            error,
            NcclError::Driver | NcclError::Device { device: 1000, .. } | NcclError::Cuda(_)
        );
        assert!(expected, "{error}");
    }
}
