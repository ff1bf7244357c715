//! Reading text: which files and formats, how much of them, and where documents begin and end.
//!
//! Knows nothing of tokens.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A line of its own between two documents.
pub const SEPARATOR: &str = "<|endoftext|>";

/// Text that is read at most, over all files: far more than any calibration takes, and what a pipe without end may send.
const BYTES_MAX: u64 = 64 << 20;
/// Files that are read at most, and how deep directories are searched for them.
const FILES_MAX: usize = 4096;
const DEPTH_MAX: usize = 8;
/// Bytes read at once.
const PIECE: u64 = 1 << 20;
/// What a directory is searched for.
const SEARCHED: [&str; 5] = ["txt", "text", "md", "jsonl", "ndjson"];

/// Text that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentsError {
    /// A file cannot be read.
    #[error("cannot read the text {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not text.
    #[error("{} is not UTF-8 text (it stops being UTF-8 at byte {valid_up_to})", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Bytes of text before the first that is none.
        valid_up_to: usize,
    },
    /// A file is of a format that is not read.
    #[error(
        "{}: {format} is not supported; convert it to .txt (documents separated by lines {SEPARATOR}) or .jsonl (one object \
         with a \"text\" to a line)",
        path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: String,
    },
    /// A line of a JSONL file holds no text.
    #[error("{}, line {line}: {reason}; each line of a .jsonl file is an object with a \"text\"", path.display())]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A JSONL file whose first line does not end.
    #[error(
        "{}: its first line does not end within the first {bytes} bytes, which are all that is read; each line of a .jsonl file is \
         an object with a \"text\", one document",
        path.display()
    )]
    LongLine {
        /// The file.
        path: PathBuf,
        /// Bytes that were read.
        bytes: usize,
    },
    /// A directory without text.
    #[error("{} holds no .txt, .md or .jsonl file", path.display())]
    NothingHere {
        /// The directory.
        path: PathBuf,
    },
}

/// Documents, and what has to be said about reading them.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    /// Each document's text, none empty.
    pub texts: Vec<String>,
    /// What was left out, in sentences.
    pub notes: Vec<String>,
}

/// Reads documents from files and directories: `.jsonl` has one to a line, in the field `text`; in every other file of text they
/// stand between lines that are [`SEPARATOR`] and nothing else but spaces.
///
/// Not more than 64 MiB is read: of each file an equal share, from its beginning.
///
/// # Errors
/// If a file cannot be read, is no text, or of a format that is not supported.
pub fn read_documents(paths: &[PathBuf]) -> Result<Documents, DocumentsError> {
    let mut documents = Documents::default();
    let mut files = Vec::new();
    for path in paths {
        match path.is_dir() {
            true => search(path, &mut files, &mut documents.notes)?,
            false => files.push(path.clone()),
        }
    }
    if files.len() > FILES_MAX {
        documents.notes.push(format!("{} files of text; the first {FILES_MAX} are read", files.len()));
        files.truncate(FILES_MAX);
    }
    let share = BYTES_MAX / files.len().max(1) as u64;
    for path in files {
        let (text, whole) = read_text(&path, share)?;
        if !whole {
            let read = share >> 10;
            documents.notes.push(format!("only the first {read} KiB of {} are read, which is plenty", path.display()));
        }
        match extension(&path).as_str() {
            "jsonl" | "ndjson" => json_lines(&path, &text, whole, &mut documents.texts)?,
            _ => split(&text, &mut documents.texts),
        }
    }
    Ok(documents)
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// What a file with this ending holds, if that is nothing to read.
fn unsupported(extension: &str) -> Option<&'static str> {
    Some(match extension {
        "csv" | "tsv" => "a table (CSV)",
        "parquet" | "arrow" | "feather" => "a table (Parquet, Arrow)",
        "json" => "one JSON value",
        "html" | "htm" | "xml" | "xhtml" => "HTML or XML",
        "pdf" => "PDF",
        "doc" | "docx" | "odt" | "rtf" | "epub" => "a word processor's file",
        "gz" | "xz" | "zst" | "bz2" | "zip" | "7z" | "tar" | "tgz" => "a compressed file or archive",
        "bin" | "pt" | "pth" | "npy" | "safetensors" | "gguf" | "flashlm" => "a file of numbers",
        _ => return None,
    })
}

/// What a file that begins so is, if its ending does not say it.
fn foreign(start: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 9] = [
        (b"PAR1", "a table (Parquet)"),
        (b"ARROW1", "a table (Arrow)"),
        (b"%PDF", "PDF"),
        (b"\x1f\x8b", "a compressed file (gzip)"),
        (b"\xfd7zXZ", "a compressed file (xz)"),
        (b"\x28\xb5\x2f\xfd", "a compressed file (zstd)"),
        (b"PK\x03\x04", "an archive (zip)"),
        (b"\xff\xfe", "UTF-16 text"),
        (b"\xfe\xff", "UTF-16 text"),
    ];
    kinds.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, kind)| kind)
}

/// Finds the files of text under a directory, in the order of their names.
fn search(dir: &Path, files: &mut Vec<PathBuf>, notes: &mut Vec<String>) -> Result<(), DocumentsError> {
    let (before, mut others) = (files.len(), Vec::new());
    walk(dir, 0, files, &mut others)?;
    if files.len() == before {
        return Err(DocumentsError::NothingHere { path: dir.to_owned() });
    }
    if !others.is_empty() {
        let names: Vec<String> = others.iter().take(3).map(|path| path.display().to_string()).collect();
        let more = if others.len() > names.len() { ", .." } else { "" };
        let names = names.join(", ") + more;
        notes.push(format!(
            "{} files under {} are neither .txt nor .jsonl and are not read: {names}",
            others.len(),
            dir.display()
        ));
    }
    Ok(())
}

fn walk(dir: &Path, depth: usize, files: &mut Vec<PathBuf>, others: &mut Vec<PathBuf>) -> Result<(), DocumentsError> {
    let io = |source| DocumentsError::Read { path: dir.to_owned(), source };
    let mut entries = fs::read_dir(dir).map_err(io)?.collect::<io::Result<Vec<_>>>().map_err(io)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A directory behind a link may be the one that holds it.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth < DEPTH_MAX {
                walk(&path, depth + 1, files, others)?;
            }
        } else if path.is_file() {
            if SEARCHED.contains(&extension(&path).as_str()) { files.push(path) } else { others.push(path) }
        }
    }
    Ok(())
}

/// The text of a file, or as much of it as `limit` allows, and whether that is all.
fn read_text(path: &Path, limit: u64) -> Result<(String, bool), DocumentsError> {
    let io = |source| DocumentsError::Read { path: path.to_owned(), source };
    let format = |format: &str| DocumentsError::Format { path: path.to_owned(), format: format.to_owned() };
    if let Some(kind) = unsupported(&extension(path)) {
        return Err(format(kind));
    }
    // Pipes are read as well, as a shell's <(command) gives one.
    let mut file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    let whole = loop {
        let left = limit - bytes.len() as u64;
        if left == 0 {
            // Whether there is more, one byte tells.
            break file.read(&mut [0]).map_err(io)? == 0;
        }
        let start = bytes.len();
        if (&mut file).take(left.min(PIECE)).read_to_end(&mut bytes).map_err(io)? == 0 {
            break true;
        }
        if start == 0
            && let Some(kind) = foreign(&bytes)
        {
            return Err(format(kind));
        }
        // No text has this byte, and files without end have nothing else.
        if let Some(at) = bytes[start..].iter().position(|byte| *byte == 0) {
            return Err(DocumentsError::NotText { path: path.to_owned(), valid_up_to: start + at });
        }
    };
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let valid_up_to = error.utf8_error().valid_up_to();
            // A character may have been cut where reading stopped.
            if whole || error.utf8_error().error_len().is_some() {
                return Err(DocumentsError::NotText { path: path.to_owned(), valid_up_to });
            }
            let mut bytes = error.into_bytes();
            bytes.truncate(valid_up_to);
            String::from_utf8(bytes).unwrap_or_default()
        }
    };
    Ok((text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text), whole))
}

/// The fields of a line that are looked at.
#[derive(Deserialize)]
struct Line {
    text: Option<String>,
}

fn json_lines(path: &Path, text: &str, whole: bool, documents: &mut Vec<String>) -> Result<(), DocumentsError> {
    // The last line may be cut.
    let text = match text.rsplit_once('\n') {
        _ if whole => text,
        Some((lines, _)) => lines,
        None => return Err(DocumentsError::LongLine { path: path.to_owned(), bytes: text.len() }),
    };
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        // Where an object belongs, serde takes a list as well.
        let is_object = line.trim_start().starts_with('{');
        let wrong = |reason: String| DocumentsError::JsonLine { path: path.to_owned(), line: number + 1, reason };
        let line: Line = serde_json::from_str(line).map_err(|e| wrong(in_one_line(&e)))?;
        if !is_object {
            return Err(wrong("it is no object".into()));
        }
        let text = line.text.ok_or_else(|| wrong("no field \"text\"".into()))?;
        if !text.trim().is_empty() {
            documents.push(text);
        }
    }
    Ok(())
}

/// An error in JSON that has one line: its number would be always 1.
fn in_one_line(error: &serde_json::Error) -> String {
    let (text, place) = (error.to_string(), format!(" at line {} column {}", error.line(), error.column()));
    match text.strip_suffix(&place) {
        Some(what) => format!("{what} (column {})", error.column()),
        None => text,
    }
}

fn split(text: &str, documents: &mut Vec<String>) {
    let first = documents.len();
    documents.push(String::new());
    for line in text.split_inclusive('\n') {
        if line.trim() == SEPARATOR {
            documents.push(String::new());
        } else if let Some(last) = documents.last_mut() {
            last.push_str(line);
        }
    }
    for document in &mut documents[first..] {
        // The newline before the mark belongs to the mark.
        document.truncate(document.trim_end_matches(['\n', '\r']).len());
    }
    documents.retain(|d| !d.is_empty());
}

/// Cuts a text into pieces of at most `bytes`: at the end of a paragraph, else of a line, a sentence, a word, a character.
pub fn pieces(text: &str, bytes: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > bytes.max(4) {
        let boundary = |at: usize| (0..=at).rev().find(|&at| rest.is_char_boundary(at)).unwrap_or(0);
        let end = boundary(bytes.max(4));
        let (head, half) = (&rest[..end], boundary(end / 2));
        // A piece is at least half as long as it may be.
        let behind = |mark: &str| head[half..].rfind(mark).map(|at| half + at + mark.len());
        let sentence = || [". ", "! ", "? ", "\u{3002}"].into_iter().filter_map(behind).max();
        let cut = behind("\n\n").or_else(|| behind("\n")).or_else(sentence).or_else(|| behind(" ")).unwrap_or(end);
        pieces.push(&rest[..cut]);
        rest = &rest[cut..];
    }
    pieces.push(rest);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Vec<String> {
        let mut documents = vec!["before".to_owned()];
        split(text, &mut documents);
        documents.split_off(1)
    }

    #[test]
    fn documents_stand_between_separator_lines() {
        let text = "one\ntwo\n<|endoftext|>\nthree <|endoftext|> still\n <|endoftext|> \r\n\n<|endoftext|>\nfour";
        assert_eq!(parts(text), ["one\ntwo", "three <|endoftext|> still", "four"]);
        assert_eq!(parts("\n\n"), [] as [String; 0]);
    }

    #[test]
    fn pieces_end_where_a_reader_would_pause() {
        let text = "First paragraph, short.\n\nA second one. It has two sentences, and more words.\nAnd a line.";
        assert_eq!(pieces(text, 1000), [text]);
        assert_eq!(pieces(text, 30)[..2], ["First paragraph, short.\n\n", "A second one. It has two "]);
        for bytes in [0, 1, 4, 7, 30, 60] {
            let cut = pieces(text, bytes);
            assert!(cut.iter().all(|piece| piece.len() <= bytes.max(4)), "{bytes}: {cut:?}");
            assert_eq!(cut.concat(), text, "{bytes}: nothing is lost");
        }
        // Without any place to pause, characters stay whole.
        assert_eq!(pieces("\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}", 5), ["\u{e9}\u{e9}", "\u{e9}\u{e9}", "\u{e9}"]);
    }

    fn read(name: &str, contents: &[u8]) -> Result<Documents, DocumentsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, contents).unwrap();
        read_documents(&[path])
    }

    #[test]
    fn formats_are_read_or_named() {
        let lines =
            b"{\"text\": \"one\\nparagraph\", \"id\": 7}\n\n{\"text\": \"\"}\r\n{\"id\": 1, \"text\": \"two\"}\n";
        assert_eq!(read("a.jsonl", lines).unwrap().texts, ["one\nparagraph", "two"]);
        assert_eq!(read("a.JSONL", lines).unwrap().texts.len(), 2);
        assert_eq!(read("noending", b"\xef\xbb\xbfwith a mark").unwrap().texts, ["with a mark"]);
        for (name, contents, expected) in [
            ("a.csv", &b"id,text\n1,a\n"[..], "a table (CSV) is not supported"),
            ("a.parquet", b"PAR1", "a table (Parquet, Arrow) is not supported"),
            ("a.html", b"<p>", "HTML or XML is not supported"),
            ("a.txt", b"\x1f\x8b\x08", "a compressed file (gzip) is not supported"),
            ("a.txt", b"\xff\xfea\x00", "UTF-16 text is not supported"),
            ("a.txt", b"text\xff", "stops being UTF-8 at byte 4"),
            ("a.txt", b"text\x00text", "stops being UTF-8 at byte 4"),
            ("a.jsonl", b"{\"text\": \"a\"}\n{\"body\": \"b\"}", "line 2: no field \"text\""),
            ("a.jsonl", b"{\"text\": 5}", "line 1: invalid type"),
            ("a.jsonl", b"[\"words\"]", "line 1: it is no object"),
            ("a.jsonl", b"[{\"text\": \"words\"}]", "line 1: "),
            ("a.jsonl", b"{\"text\": \"a\"}\nplain text", "a.jsonl, line 2: expected value (column 1); each"),
            ("a.jsonl", b"{\"text\": \"\\ud83d\"}", "line 1: unexpected end of hex escape (column"),
        ] {
            let said = read(name, contents).unwrap_err().to_string();
            assert!(said.contains(expected), "{name}: {said}");
        }
    }

    #[test]
    fn a_line_without_end_is_named() {
        let path = Path::new("a.jsonl");
        let said = json_lines(path, "{\"text\": \"words", false, &mut Vec::new()).unwrap_err().to_string();
        assert!(said.contains("a.jsonl: its first line does not end within the first 15 bytes"), "{said}");
        let mut documents = Vec::new();
        json_lines(path, "{\"text\": \"words\"}\n{\"text", false, &mut documents).unwrap();
        assert_eq!(documents, ["words"]);
    }

    #[test]
    fn directories_are_searched_and_say_what_they_leave() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("inner")).unwrap();
        write("b.txt", "second");
        write("a.jsonl", "{\"text\": \"first\"}\n");
        write("c.csv", "1,2");
        write(".hidden.txt", "no");
        write("inner/d.txt", "third");
        std::os::unix::fs::symlink(dir.path(), dir.path().join("inner/round")).unwrap();
        let documents = read_documents(&[dir.path().to_owned()]).unwrap();
        assert_eq!(documents.texts, ["first", "second", "third"]);
        assert!(documents.notes.len() == 1 && documents.notes[0].contains("c.csv"), "{:?}", documents.notes);
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(read_documents(&[empty.path().into()]), Err(DocumentsError::NothingHere { .. })));
    }

    #[test]
    fn files_without_end_end() {
        assert!(matches!(read_documents(&["/dev/zero".into()]), Err(DocumentsError::NotText { valid_up_to: 0, .. })));
        let (mut reader, writer) = io::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let writing =
            std::thread::spawn(move || while io::Write::write_all(&mut &writer, b"again and again\n").is_ok() {});
        let (text, whole) = read_text(Path::new(&path), 1 << 20).unwrap();
        assert!(text.len() == 1 << 20 && !whole);
        // The writer ends when nobody reads.
        let mut left = [0; 1];
        reader.read_exact(&mut left).unwrap();
        drop(reader);
        writing.join().unwrap();
        // A character that is cut in two is left out.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        fs::write(&path, "caf\u{e9}s").unwrap();
        assert_eq!(read_text(&path, 4).unwrap(), ("caf".into(), false));
        assert_eq!(read_text(&path, 6).unwrap(), ("caf\u{e9}s".into(), true));
    }
}
