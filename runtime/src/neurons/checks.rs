//! Verifies what was read from flash against the checksums in the bundle's index.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flashlm_formats::bundle::{Bundle, checksum};
use flashlm_formats::ids::GroupId;
use flashlm_kernels::Threads;

use crate::error::{Result, RuntimeError};

/// Groups that one task checks.
const GROUPS_PER_TASK: usize = 16;

/// The checksums of all groups of a bundle.
#[derive(Clone)]
pub struct GroupChecks {
    path: PathBuf,
    layers: Vec<Arc<[u64]>>,
    group_bytes: usize,
}

impl GroupChecks {
    /// Those of `bundle`.
    pub fn new(bundle: &Bundle) -> Self {
        Self {
            path: bundle.path().to_owned(),
            layers: (0..bundle.spec().layers.len()).map(|layer| Arc::clone(bundle.group_checksums(layer))).collect(),
            group_bytes: bundle.layout().group_bytes(),
        }
    }

    /// Checks whole groups of `layer`, of which `first` is the first.
    ///
    /// # Errors
    /// `Checksum` with the first group that is not as it was written.
    pub fn contiguous(&self, threads: &Threads, layer: usize, first: GroupId, bytes: &[u8]) -> Result<()> {
        let group = |i: usize| &bytes[i * self.group_bytes..][..self.group_bytes];
        self.each(threads, layer, bytes.len() / self.group_bytes, &|i| (first.after(i as u32), group(i)))
    }

    /// Checks `count` groups of `layer`; `group` gives the number and the bytes of each.
    ///
    /// # Errors
    /// `Checksum` with the first of them that is not as it was written.
    pub fn each<'a>(
        &self,
        threads: &Threads,
        layer: usize,
        count: usize,
        group: &(dyn Fn(usize) -> (GroupId, &'a [u8]) + Sync),
    ) -> Result<()> {
        let sums = &self.layers[layer];
        let first_bad = AtomicUsize::new(usize::MAX);
        threads.run(count.div_ceil(GROUPS_PER_TASK), &|task| {
            for i in task * GROUPS_PER_TASK..count.min((task + 1) * GROUPS_PER_TASK) {
                let (number, bytes) = group(i);
                if checksum(bytes) != sums[number.index()] {
                    first_bad.fetch_min(i, Ordering::Relaxed);
                }
            }
        });
        match first_bad.into_inner() {
            usize::MAX => Ok(()),
            i => {
                let (number, bytes) = group(i);
                Err(RuntimeError::Checksum {
                    path: self.path.clone(),
                    part: format!("group {number} of layer {layer}"),
                    expected: sums[number.index()],
                    found: checksum(bytes),
                })
            }
        }
    }
}
