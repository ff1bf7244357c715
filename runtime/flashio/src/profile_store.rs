//! Where profiles are kept, one file for each disk, and how disks are told apart. Who measured one writes it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::DiskProfile;

/// Overrides the folder that profiles and bundles of models of the hub are kept in.
pub const CACHE_DIR_VARIABLE: &str = "FLASHLM_CACHE_DIR";

/// A name for the disk below a path, fit for a file name: the device, its model and its size where the system tells,
/// else the device number.
pub fn device_key(path: &Path) -> String {
    let Ok(metadata) = fs::metadata(path) else { return "unknown".into() };
    let device = metadata.dev();
    let key = described_device(device).unwrap_or_else(|| format!("dev-{device:x}"));
    key.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '_' }).collect()
}

/// Bytes that the device below a path has read and written since the system started, for anybody; `None` where nobody counts them.
pub(crate) fn moved_bytes(path: &Path) -> Option<u64> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let counted = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    let field = |at: usize| counted.split_ascii_whitespace().nth(at)?.parse::<u64>().ok();
    // In sectors of 512 bytes, whatever the device has: Documentation/block/stat.rst.
    Some((field(2)? + field(6)?).saturating_mul(512))
}

#[cfg(target_os = "linux")]
fn described_device(device: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let node = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // A partition's folder lies inside its disk's.
    let disk = if node.join("partition").exists() { node.parent()? } else { &node };
    let read = |name: &str| fs::read_to_string(disk.join(name)).map(|s| s.trim().to_owned()).unwrap_or_default();
    let parts = [disk.file_name()?.to_string_lossy().into_owned(), read("device/model"), read("serial"), read("size")];
    Some(parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-"))
}

#[cfg(not(target_os = "linux"))]
fn described_device(_: u64) -> Option<String> {
    None
}

/// The folder that profiles and bundles of models of the hub are kept in: `FLASHLM_CACHE_DIR`, else `flashlm` in the user's cache folder.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set(CACHE_DIR_VARIABLE)
        .or_else(|| set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|path| path.join("flashlm")))
        .or_else(|| set("HOME").map(|home| home.join(".cache").join("flashlm")))
}

impl DiskProfile {
    /// The file that the profile of `device` is kept in, in a folder of profiles.
    pub fn path_in(folder: &Path, device: &str) -> PathBuf {
        folder.join(format!("disk-{device}.json"))
    }

    /// What is in that file.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("numbers and texts have a JSON form")
    }

    /// Time since the kept profile of a disk was written, as far as the file tells.
    pub fn age(folder: &Path, device: &str) -> Option<Duration> {
        fs::metadata(Self::path_in(folder, device)).ok()?.modified().ok()?.elapsed().ok()
    }

    /// The kept profile of a disk; `None` where there is none, or none that can be used.
    pub fn load(folder: &Path, device: &str) -> Option<Self> {
        let bytes = fs::read(Self::path_in(folder, device)).ok()?;
        let profile: Self = serde_json::from_slice(&bytes).ok()?;
        (profile.is_sound() && profile.device == device).then_some(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::plain_disk;

    #[test]
    fn profiles_survive_being_kept_and_broken_ones_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made/for/it");
        let profile = plain_disk();
        assert_eq!(DiskProfile::load(&folder, "plain"), None);
        let path = DiskProfile::path_in(&folder, "plain");
        fs::create_dir_all(&folder).unwrap();
        fs::write(&path, profile.to_json()).unwrap();
        assert_eq!(DiskProfile::load(&folder, "plain"), Some(profile));
        fs::write(&path, b"{").unwrap();
        assert_eq!(DiskProfile::load(&folder, "plain"), None);
    }

    #[test]
    fn keys_are_file_names_and_repeat() {
        let folder = tempfile::tempdir().unwrap();
        let key = device_key(folder.path());
        assert!(!key.is_empty() && !key.contains('/') && key == device_key(folder.path()), "{key}");
        assert_eq!(device_key(&folder.path().join("absent")), "unknown");
    }
}
