//! Compares `docs/bundle-format.md` with the code: every table of offsets there is read and compared with the constants.

use super::header::{self, FORMAT_VERSION, HEADER_BYTES, MAGIC};
use super::section::{SECTION_ALIGNMENT, Section};
use super::{DEFAULT_ALIGNMENT, DEFAULT_GROUP_BYTES, index, limits, resident};
use crate::model::LAYERS_MAX;

const PAGE: &str = include_str!("../../../docs/bundle-format.md");

/// Rows of the table below the heading: offset, length, name. Offsets and lengths that are not plain numbers are kept as text.
fn table(heading: &str) -> Vec<(String, String, String)> {
    let (_, rest) = PAGE.split_once(&format!("\n### {heading}\n")).unwrap_or_else(|| panic!("no heading {heading}"));
    let section = rest.split("\n### ").next().unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let cells = rows.map(|line| line.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>());
    cells.skip(1).map(|c| (c[0].clone(), c[1].clone(), c[2].clone())).collect()
}

/// The same with numbers, each row beginning where the one before ended.
fn chained(heading: &str) -> Vec<(usize, usize, String)> {
    let rows: Vec<_> =
        table(heading).into_iter().map(|(at, len, name)| (at.parse().unwrap(), len.parse().unwrap(), name)).collect();
    for pair in rows.windows(2) {
        let [(at, len, name), (next, ..)] = pair else { unreachable!() };
        assert_eq!(at + len, *next, "{heading}: behind {name}");
    }
    rows
}

fn row(at: usize, len: usize, name: &str) -> (usize, usize, String) {
    (at, len, name.to_owned())
}

#[test]
fn header_is_as_described() {
    let expected = [
        row(header::MAGIC_OFFSET, MAGIC.len(), "magic"),
        row(header::VERSION_OFFSET, 4, "version"),
        row(header::SECTION_COUNT_OFFSET, 4, "section count"),
        row(header::FILE_BYTES_OFFSET, 8, "file length"),
        row(header::SECTION_TABLE_OFFSET, Section::ALL.len() * header::SECTION_ENTRY_BYTES, "section table"),
        row(header::RESERVED_OFFSET, header::HEADER_CHECKSUM_OFFSET - header::RESERVED_OFFSET, "reserved"),
        row(header::HEADER_CHECKSUM_OFFSET, 8, "checksum"),
    ];
    assert_eq!(chained("Header"), expected);
    assert_eq!(header::HEADER_CHECKSUM_OFFSET + 8, HEADER_BYTES);
    let magic: Vec<_> = MAGIC.iter().map(|byte| format!("{byte:02X}")).collect();
    assert!(PAGE.contains(&format!("`{}`", magic.join(" "))));
}

#[test]
fn section_table_is_as_described() {
    let expected: Vec<_> = Section::ALL
        .iter()
        .map(|s| row(header::SECTION_TABLE_OFFSET + *s as usize * header::SECTION_ENTRY_BYTES, 24, s.name()))
        .collect();
    assert_eq!(chained("Section table"), expected);
    let entry = [row(0, 8, "offset"), row(8, 8, "length"), row(16, 8, "checksum")];
    assert_eq!(chained("Section entry"), entry);
}

#[test]
fn index_is_as_described() {
    let expected = [
        row(index::LAYERS_OFFSET, 4, "layers"),
        row(index::NEURONS_OFFSET, 4, "neurons"),
        row(index::GROUPS_OFFSET, 4, "groups"),
        row(index::INDEX_RESERVED_OFFSET, 4, "reserved"),
    ];
    assert_eq!(chained("Index head"), expected);
    assert_eq!(index::TABLES_OFFSET, 16);
    let tables = table("Index table of a layer");
    assert_eq!(tables[0], (index::BASE_OFFSET.to_string(), "8".into(), "base".into()));
    assert_eq!(tables[1], (index::ORDER_OFFSET.to_string(), "4 x neurons".into(), "order".into()));
}

#[test]
fn numbers_in_the_text_are_those_of_the_code() {
    for text in [
        format!("Format version: **{FORMAT_VERSION}**"),
        format!("multiple of {SECTION_ALIGNMENT}"),
        format!("alignment is {DEFAULT_ALIGNMENT} unless"),
        format!("group length is {DEFAULT_GROUP_BYTES} unless"),
        format!("multiple of {} bytes", resident::DATA_ALIGNMENT),
        format!("manifest {} MiB", limits::MANIFEST_BYTES_MAX >> 20),
        format!("tokenizer {} GiB", limits::TOKENIZER_BYTES_MAX >> 30),
        format!("index {} GiB", limits::INDEX_BYTES_MAX >> 30),
        format!("1 to {LAYERS_MAX}"),
        format!("at most {} kinds in a model", limits::KINDS_OF_POSITIONS_MAX),
    ] {
        assert!(PAGE.contains(&text), "docs/bundle-format.md does not say: {text}");
    }
}
