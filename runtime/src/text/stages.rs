//! The steps of a tokenizer's decoder, for tokens that come one at a time.
//!
//! The library's decoders rewrite the list of all tokens. Each has a stage here that does the same to tokens as they come, with a
//! state that does not grow with the text, and gives out what no later token can change. The tests hold them against the library.
//!
//! In one place they differ on purpose. The library turns a whole run of byte tokens into replacement characters if a single byte
//! of it is wrong, however far behind: text that was shown long ago would have to be taken back. Here, as in sentencepiece, where these
//! tokens come from, characters that are whole stay, and each byte that is part of none becomes a replacement character.

use std::sync::Arc;

use tokenizers::Decoder as _;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::ctc::CTC;
use tokenizers::decoders::strip::Strip;
use tokenizers::decoders::wordpiece::cleanup;
use tokenizers::normalizers::replace::Replace;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use super::bytes::{Bytes, Wrong};
use super::matcher::Matcher;
use crate::guard::guarded;

/// A piece of text as one decoder hands it to the next, or a part of one.
pub(super) struct Part {
    pub(super) text: String,
    /// Whether the piece begins with it.
    pub(super) first: bool,
    /// Whether the piece ends with it.
    pub(super) last: bool,
}

impl Part {
    /// A piece in one part.
    pub(super) fn whole(text: String) -> Self {
        Self { text, first: true, last: true }
    }

    /// What continues with a piece.
    fn more(text: String, last: bool) -> Self {
        Self { text, first: false, last }
    }
}

/// The stages of a tokenizer's decoder.
pub(super) fn stages(decoder: Option<&DecoderWrapper>) -> Vec<Stage> {
    let mut stages = Vec::new();
    match decoder {
        Some(decoder) => add(decoder, &mut stages),
        None => stages.push(Stage::new(Rule::Spaced)),
    }
    stages
}

fn add(decoder: &DecoderWrapper, stages: &mut Vec<Stage>) {
    stages.push(Stage::new(match decoder {
        DecoderWrapper::Sequence(all) => return all.get_decoders().iter().for_each(|decoder| add(decoder, stages)),
        DecoderWrapper::BPE(bpe) => Rule::WordEnds { suffix: bpe.suffix.as_str().into(), held: None },
        DecoderWrapper::ByteLevel(_) => Rule::ByteLevel(Bytes::new(Wrong::LongestParts)),
        DecoderWrapper::WordPiece(words) => {
            Rule::WordPiece { prefix: words.prefix.as_str().into(), cleanup: words.cleanup }
        }
        DecoderWrapper::Metaspace(space) => Rule::Metaspace {
            replacement: space.get_replacement(),
            first_without: space.prepend_scheme != PrependScheme::Never,
        },
        DecoderWrapper::CTC(ctc) => Rule::Ctc { ctc: ctc.clone().into(), previous: None },
        DecoderWrapper::Replace(replace) => replacing(replace),
        DecoderWrapper::Fuse(_) => Rule::Fuse,
        DecoderWrapper::Strip(strip) => Rule::Strip { strip: strip.clone(), leading: 0, trailing: 0 },
        DecoderWrapper::ByteFallback(_) => Rule::ByteTokens { bytes: Bytes::new(Wrong::EachByte), open: false },
    }));
}

/// A text can be watched for; a pattern is asked when it has the whole piece before it.
fn replacing(replace: &Replace) -> Rule {
    let rule = serde_json::to_value(replace).unwrap_or_default();
    match rule["pattern"]["String"].as_str() {
        Some(text) if !text.is_empty() => {
            Rule::Replace { watched: Matcher::new(text.to_owned()), content: replace.content.as_str().into() }
        }
        _ => Rule::Pattern(replace.clone().into()),
    }
}

/// One decoder and what it remembers.
#[derive(Clone)]
pub(super) struct Stage {
    rule: Rule,
    /// How many pieces have begun.
    pieces: u64,
    /// The beginning of a piece, for rules that need it whole. Only after a stage that makes all pieces one is that more than a
    /// token or a run of them.
    gathered: String,
}

#[derive(Clone)]
enum Rule {
    /// No decoder: spaces between tokens.
    Spaced,
    /// All pieces become one.
    Fuse,
    /// A character is a space, or nothing in the first piece.
    Metaspace { replacement: char, first_without: bool },
    /// A text becomes another.
    Replace { watched: Matcher, content: Arc<str> },
    /// `leading` characters may still be removed; `trailing` are held back, and go if the piece ends with them.
    Strip { strip: Strip, leading: usize, trailing: usize },
    /// What a pattern finds becomes another text.
    Pattern(Arc<Replace>),
    /// A text at the end of words is a space, but nothing in the last piece: it is held back from the first of them on.
    WordEnds { suffix: Arc<str>, held: Option<String> },
    /// Characters are bytes, as GPT-2 has it, and all pieces one.
    ByteLevel(Bytes),
    /// Words are pieces; what begins with the prefix continues with one.
    WordPiece { prefix: Arc<str>, cleanup: bool },
    /// Repeated pieces are one, some are none.
    Ctc { ctc: Arc<CTC>, previous: Option<String> },
    /// Pieces like `<0x0A>` are bytes; `open` while a run of them is.
    ByteTokens { bytes: Bytes, open: bool },
}

impl Stage {
    fn new(rule: Rule) -> Self {
        Self { rule, pieces: 0, gathered: String::new() }
    }

    /// Takes a part; what is certain now goes to `out`.
    pub(super) fn take(&mut self, part: Part, out: &mut Vec<Part>) {
        self.pieces += u64::from(part.first);
        let in_first = self.pieces == 1;
        let Part { text, first, last } = part;
        match &mut self.rule {
            Rule::Spaced if first && !in_first => out.push(Part { text: format!(" {text}"), first, last }),
            Rule::Spaced => out.push(Part { text, first, last }),
            Rule::Fuse => out.push(Part { text, first: first && in_first, last: false }),
            Rule::Metaspace { replacement, first_without } => {
                let space = if in_first && *first_without { "" } else { " " };
                out.push(Part { text: text.replace(*replacement, space), first, last });
            }
            Rule::Replace { watched, content } => {
                out.push(Part { text: replaced(watched, content, &text, last), first, last });
            }
            Rule::Strip { strip, leading, trailing } => {
                if first {
                    (*leading, *trailing) = (strip.start, 0);
                }
                out.push(Part { text: stripped(strip, leading, trailing, &text), first, last });
            }
            rule => {
                self.gathered += &text;
                if last {
                    rule.take_whole(std::mem::take(&mut self.gathered), in_first, out);
                }
            }
        }
    }

    /// There is no further part.
    pub(super) fn end(&mut self, out: &mut Vec<Part>) {
        let first = self.pieces == 0;
        match &mut self.rule {
            Rule::Fuse => out.push(Part { text: String::new(), first, last: true }),
            Rule::ByteLevel(bytes) => out.push(Part { text: bytes.end(), first, last: true }),
            Rule::ByteTokens { bytes, open: true } => out.push(Part::more(bytes.end(), true)),
            Rule::WordEnds { suffix, held } => {
                out.extend(held.take().map(|held| Part::more(held.replace(&**suffix, ""), true)));
            }
            _ => {}
        }
    }
}

impl Rule {
    fn take_whole(&mut self, piece: String, first: bool, out: &mut Vec<Part>) {
        match self {
            Rule::WordEnds { suffix, held } => {
                let rest = piece.find(&**suffix).unwrap_or(piece.len());
                let before = held.replace(piece[rest..].to_owned());
                out.extend(before.map(|held| Part::more(held.replace(&**suffix, " "), true)));
                out.push(Part { text: piece[..rest].to_owned(), first: true, last: false });
            }
            Rule::ByteLevel(bytes) => {
                let known: Option<Vec<u8>> = piece.chars().map(byte_of).collect();
                let text = bytes.push(known.as_deref().unwrap_or(piece.as_bytes()));
                out.push(Part { text, first, last: false });
            }
            Rule::WordPiece { prefix, cleanup: clean } => {
                let piece = match piece.strip_prefix(&**prefix) {
                    _ if first => piece,
                    Some(rest) => rest.to_owned(),
                    None => format!(" {piece}"),
                };
                out.push(Part::whole(if *clean { cleanup(&piece) } else { piece }));
            }
            Rule::Ctc { ctc, previous } => {
                if previous.as_ref() != Some(&piece) {
                    let pieces = guarded(|| ctc.decode_chain(vec![piece.clone()]));
                    out.extend(pieces.ok().and_then(Result::ok).into_iter().flatten().map(Part::whole));
                    *previous = Some(piece);
                }
            }
            Rule::ByteTokens { bytes, open } => match byte_token(&piece) {
                Some(byte) => {
                    out.push(Part { text: bytes.push(&[byte]), first: !std::mem::replace(open, true), last: false })
                }
                None => {
                    if std::mem::replace(open, false) {
                        out.push(Part::more(bytes.end(), true));
                    }
                    out.push(Part::whole(piece));
                }
            },
            Rule::Pattern(replace) => {
                // A pattern that gives up on a text leaves it as it is.
                let pieces = guarded(|| replace.decode_chain(vec![piece.clone()]));
                out.push(Part::whole(pieces.ok().and_then(Result::ok).map_or(piece, |pieces| pieces.concat())));
            }
            _ => out.push(Part::whole(piece)),
        }
    }
}

/// `text` with `content` in place of what is watched for; its beginning is held back, but at the end of a piece.
fn replaced(watched: &mut Matcher, content: &str, text: &str, last: bool) -> String {
    let mut out = watched.pattern()[..watched.matched()].to_owned();
    for character in text.chars() {
        out.push(character);
        let mut utf8 = [0; 4];
        // Only with its last byte can a character complete a text.
        if character.encode_utf8(&mut utf8).bytes().fold(false, |_, byte| watched.step(byte)) {
            out.truncate(out.len() - watched.pattern().len());
            out += content;
            watched.restart();
        }
    }
    if last {
        watched.restart();
    }
    out.truncate(out.len() - watched.matched());
    out
}

/// `text` without characters that are removed at a piece's start, and those held back that may be removed at its end.
fn stripped(strip: &Strip, leading: &mut usize, trailing: &mut usize, text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character == strip.content && *leading > 0 {
            *leading -= 1;
            continue;
        }
        *leading = 0;
        if character == strip.content && *trailing < strip.stop {
            *trailing += 1;
            continue;
        }
        if character != strip.content {
            out.extend(std::iter::repeat_n(strip.content, std::mem::take(trailing)));
        }
        out.push(character);
    }
    out
}

/// The byte that a token like `<0x0A>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character stands for in byte-level tokenizers: visible ones of Latin-1 for themselves, the others, in order, for
/// U+0100 and what follows.
fn byte_of(character: char) -> Option<u8> {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(character) {
        code @ 0..=0xff => Some(code as u8).filter(|byte| visible(*byte)),
        code @ 0x100..=0x143 => (0..=0xff).filter(|byte| !visible(*byte)).nth(code as usize - 0x100),
        _ => None,
    }
}
