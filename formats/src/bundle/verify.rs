//! Reads all of a bundle and reports every damaged place.

use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::checksum;
use super::error::{BundleError, Fault};
use super::header::HEADER_BYTES;
use super::reader::Bundle;
use super::section::{Extent, SECTION_ALIGNMENT, Section, SectionInfo};
use crate::weight_format::SCALE_BYTES;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Every damaged place.
    pub damages: Vec<Fault>,
    /// Bytes that were read and checked.
    pub checked_bytes: u64,
    /// Bytes between sections that belong to none: what replaced predictors left. Their contents mean nothing.
    pub unused_bytes: u64,
    /// Bytes after the end that the header states: see [`Bundle::trailing_bytes`].
    pub trailing_bytes: u64,
}

/// Bytes read at once, about.
const PIECE_BYTES: u64 = 4 << 20;

/// Checks every checksum of the bundle at `path`, and that all padding is zero. `progress` is told the bytes done and the bytes
/// in all.
///
/// # Errors
/// Whatever opening it reports (header, manifest, tokenizer and index are checked there), and `Io`. Damage in the large
/// sections is no error but part of the report.
pub fn verify(path: impl AsRef<Path>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, BundleError> {
    let bundle = Bundle::open(path)?;
    let mut check = Check {
        bundle: &bundle,
        report: VerifyReport::default(),
        buffer: Vec::new(),
        done: HEADER_BYTES as u64,
        progress,
    };
    check.gaps()?;
    for (section, extent) in bundle.header().in_file_order() {
        match section {
            Section::Flash => check.flash()?,
            // Opening has checked these.
            Section::Manifest | Section::Tokenizer | Section::Index => check.advance(extent.bytes),
            Section::Predictors => check.section(section, bundle.header().section(section))?,
            Section::Resident => {
                check.section(section, bundle.header().section(section))?;
                check.scales()?;
            }
        }
    }
    check.report.checked_bytes = bundle.file_bytes() - check.report.unused_bytes - check.report.trailing_bytes;
    Ok(check.report)
}

struct Check<'a> {
    bundle: &'a Bundle,
    report: VerifyReport,
    buffer: Vec<u8>,
    done: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl VerifyReport {
    /// Whether the file is a bundle as it was written, and nothing else.
    pub fn is_whole(&self) -> bool {
        self.damages.is_empty() && self.trailing_bytes == 0
    }
}

impl Check<'_> {
    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.bundle.file_bytes());
    }

    fn read(&mut self, extent: Extent) -> Result<(), BundleError> {
        self.buffer.resize(extent.bytes as usize, 0);
        self.bundle.read_at(extent.offset, &mut self.buffer)?;
        self.advance(extent.bytes);
        Ok(())
    }

    /// What lies between sections: up to the next one's alignment it has to be zero, beyond that it is unused.
    fn gaps(&mut self) -> Result<(), BundleError> {
        let mut end = HEADER_BYTES as u64;
        let alignment = |section| match section {
            Section::Flash => SECTION_ALIGNMENT.max(self.bundle.layout().alignment() as u64),
            _ => SECTION_ALIGNMENT,
        };
        let mut gaps = Vec::new();
        for (section, extent) in self.bundle.header().in_file_order() {
            let padding_end = end.next_multiple_of(alignment(section)).min(extent.offset);
            gaps.push(Extent { offset: end, bytes: padding_end - end });
            self.report.unused_bytes += extent.offset - padding_end;
            end = extent.end();
        }
        self.report.trailing_bytes = self.bundle.trailing_bytes();
        for gap in gaps {
            self.read(gap)?;
            if let Some(at) = self.buffer.iter().position(|byte| *byte != 0) {
                let what = format!("padding between sections, byte {}", gap.offset + at as u64);
                self.report.damages.push(Fault::new(None, what, 0, self.buffer[at]));
            }
        }
        self.advance(self.report.unused_bytes + self.report.trailing_bytes);
        Ok(())
    }

    fn section(&mut self, section: Section, info: SectionInfo) -> Result<(), BundleError> {
        let mut hash = Xxh3::new();
        let mut at = info.extent.offset;
        while at < info.extent.end() {
            let bytes = PIECE_BYTES.min(info.extent.end() - at);
            self.read(Extent { offset: at, bytes })?;
            hash.update(&self.buffer);
            at += bytes;
        }
        if hash.digest() != info.checksum {
            self.report.damages.push(Fault::checksum(section, "the section", info.checksum, hash.digest()));
        }
        Ok(())
    }

    /// Every scale has to be a finite number.
    fn scales(&mut self) -> Result<(), BundleError> {
        let bundle = self.bundle;
        let of_tensors =
            bundle.resident_tensors().iter().filter_map(|t| Some((format!("scales of {}", t.name), t.scales?)));
        let of_layers = (0..bundle.spec().layers.len())
            .filter_map(|layer| Some((format!("scales of the FFN of layer {layer}"), bundle.ffn_scales(layer)?)));
        for (what, extent) in of_tensors.chain(of_layers) {
            let mut at = extent.offset;
            while at < extent.end() {
                let bytes = PIECE_BYTES.min(extent.end() - at);
                self.buffer.resize(bytes as usize, 0);
                bundle.read_at(at, &mut self.buffer)?;
                // Infinities and NaN have all bits of the exponent.
                let finite = |scale: &[u8]| scale[1] & 0x7f != 0x7f || scale[0] & 0x80 == 0;
                if let Some(wrong) = self.buffer.chunks_exact(SCALE_BYTES).position(|scale| !finite(scale)) {
                    let place = at + (wrong * SCALE_BYTES) as u64;
                    self.report.damages.push(Fault::new(
                        Section::Resident,
                        format!("{what}, byte {place}"),
                        "a finite number",
                        "another",
                    ));
                    break;
                }
                at += bytes;
            }
        }
        Ok(())
    }

    fn flash(&mut self) -> Result<(), BundleError> {
        let bundle = self.bundle;
        let layout = bundle.layout();
        let at_once = (PIECE_BYTES as usize / layout.group_bytes()).max(1);
        for layer in 0..bundle.spec().layers.len() {
            let sums = bundle.group_checksums(layer);
            for first in (0..layout.groups()).step_by(at_once) {
                let count = at_once.min(layout.groups() - first);
                let bytes = (count * layout.group_bytes()) as u64;
                self.read(Extent { offset: bundle.group(layer, first).offset, bytes })?;
                for (number, bytes) in self.buffer.chunks_exact(layout.group_bytes()).enumerate() {
                    let group = first + number;
                    let place =
                        || format!("layer {layer}, group {group} at byte {}", bundle.group(layer, group).offset);
                    let found = checksum(bytes);
                    if found != sums[group] {
                        self.report.damages.push(Fault::checksum(Section::Flash, place(), sums[group], found));
                    } else if bytes[layout.group_padding(group)].iter().any(|byte| *byte != 0) {
                        let fault = Fault::new(Section::Flash, place(), "padding of zeros", "other bytes");
                        self.report.damages.push(fault);
                    }
                }
            }
            self.layer_end(layer)?;
        }
        Ok(())
    }

    /// The zeros after a layer's groups.
    fn layer_end(&mut self, layer: usize) -> Result<(), BundleError> {
        let (groups, layout) = (self.bundle.layer(layer), self.bundle.layout());
        self.read(Extent { offset: groups.end(), bytes: (layout.layer_stride() - layout.layer_bytes()) as u64 })?;
        if let Some(at) = self.buffer.iter().position(|byte| *byte != 0) {
            let what = format!("padding after layer {layer}, byte {}", groups.end() + at as u64);
            self.report.damages.push(Fault::new(Section::Flash, what, 0, self.buffer[at]));
        }
        Ok(())
    }
}
