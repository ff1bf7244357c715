//! Calibration text: documents, sampled and cut into sequences of token ids.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flashlm_formats::bundle::checksum;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::regular::open_regular;
use flashlm_runtime::error::RuntimeError;
use flashlm_runtime::text::Tokenizer;
use xxhash_rust::xxh3::Xxh3;

/// A line of its own between two documents.
pub const SEPARATOR: &str = "<|endoftext|>";

/// The calibration text cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file cannot be read.
    #[error("cannot read the text {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not text.
    #[error("{} is not UTF-8 text (byte {valid_up_to} is where it ends to be)", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Bytes of text before the first that is none.
        valid_up_to: usize,
    },
    /// There is hardly any text.
    #[error(
        "the text has only {tokens} tokens in {documents} documents; at least {needed} tokens in 2 documents are needed, and 20000 or more serve well"
    )]
    TooShort {
        /// Tokens found.
        tokens: usize,
        /// Documents found.
        documents: usize,
        /// Tokens needed.
        needed: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] RuntimeError),
}

/// How calibration text is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Tokens to take at most.
    pub tokens: usize,
    /// Longest sequence.
    pub sequence_tokens: usize,
    /// Order of the documents; 0 keeps that of the files.
    pub seed: u64,
}

/// Token ids in sequences.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// All ids, sequence after sequence.
    pub tokens: Vec<u32>,
    /// Where sequences begin, and the number of tokens.
    pub sequences: Vec<u32>,
    /// For every token the number of its document.
    pub documents: Vec<u32>,
    /// Longest sequence allowed.
    pub sequence_tokens: usize,
    /// Seed of the sampling.
    pub seed: u64,
    /// Hash of the text.
    pub text_fingerprint: u64,
}

/// The documents of text files: parts between lines that are exactly [`SEPARATOR`].
pub fn read_documents(paths: &[PathBuf]) -> Result<Vec<String>, TextError> {
    let mut documents = Vec::new();
    for path in paths {
        let bytes = std::fs::read(path).map_err(|source| TextError::Read { path: path.clone(), source })?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| TextError::NotText { path: path.clone(), valid_up_to: e.valid_up_to() })?;
        documents.extend(split(text));
    }
    Ok(documents)
}

fn split(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.split_inclusive('\n') {
        if line.trim_end_matches(['\n', '\r']) == SEPARATOR {
            documents.push(String::new());
        } else if let Some(last) = documents.last_mut() {
            last.push_str(line);
        }
    }
    for document in &mut documents {
        // The newline before the mark belongs to the mark.
        document.truncate(document.trim_end_matches(['\n', '\r']).len());
    }
    documents.retain(|d| !d.is_empty());
    documents
}

/// What stands between two texts, and in front of one that is made of nothing: what the tokenizer puts in front of every text;
/// where it puts nothing there, the id that the model's configuration begins one with, or ends one with.
pub fn between_texts(tokenizer: &Tokenizer, spec: &ModelSpec) -> Vec<u32> {
    match tokenizer.first_ids() {
        [] => begins_by_configuration(spec).into_iter().collect(),
        first => first.to_vec(),
    }
}

fn begins_by_configuration(spec: &ModelSpec) -> Option<u32> {
    spec.bos.or(spec.eos.first().copied())
}

impl Calibration {
    /// Tokenises `documents` in a seeded order until there are enough tokens.
    pub fn new(
        documents: &[String],
        tokenizer: &Tokenizer,
        spec: &ModelSpec,
        sampling: Sampling,
    ) -> Result<Self, TextError> {
        let sequence_tokens = sampling.sequence_tokens.min(spec.max_positions).max(2);
        let mut order: Vec<usize> = (0..documents.len()).collect();
        if sampling.seed != 0 {
            shuffle(&mut order, sampling.seed);
        }
        // As a prompt begins, and every piece of a long document too.
        let first = tokenizer.first_ids();
        let mut calibration = Self {
            tokens: Vec::new(),
            sequences: vec![0],
            documents: Vec::new(),
            sequence_tokens,
            seed: sampling.seed,
            text_fingerprint: checksum(documents.join("\0").as_bytes()),
        };
        for (number, &document) in order.iter().enumerate() {
            for piece in
                tokenizer.encode_bare(&documents[document])?.chunks(sequence_tokens.saturating_sub(first.len()).max(1))
            {
                let left = sampling.tokens.saturating_sub(calibration.tokens.len());
                let taken = left.min(first.len() + piece.len());
                if taken <= first.len() {
                    break;
                }
                calibration.tokens.extend_from_slice(first);
                calibration.tokens.extend_from_slice(&piece[..taken - first.len()]);
                calibration.documents.resize(calibration.tokens.len(), number as u32);
                calibration.sequences.push(calibration.tokens.len() as u32);
            }
        }
        let (tokens, used) = (calibration.tokens.len(), calibration.documents.last().map_or(0, |d| *d as usize + 1));
        const NEEDED: usize = 256;
        if tokens < NEEDED || used < 2 {
            return Err(TextError::TooShort { tokens, documents: used, needed: NEEDED });
        }
        Ok(calibration)
    }

    /// Evenly distributed ids in full sequences, each a document of its own: for models whose weights mean nothing.
    pub fn random(spec: &ModelSpec, sampling: Sampling) -> Self {
        let sequence_tokens = sampling.sequence_tokens.min(spec.max_positions).max(2);
        let first = begins_by_configuration(spec);
        let offsets = (0..sampling.tokens.max(1)).step_by(sequence_tokens).map(|at| at as u32);
        let id = |at: usize| match first {
            Some(first) if at.is_multiple_of(sequence_tokens) => first,
            _ => {
                let random = checksum(&[sampling.seed.to_le_bytes(), (at as u64).to_le_bytes()].concat());
                ((u128::from(random) * spec.vocab_size as u128) >> 64) as u32
            }
        };
        Self {
            tokens: (0..sampling.tokens.max(1)).map(id).collect(),
            sequences: offsets.chain([sampling.tokens.max(1) as u32]).collect(),
            documents: (0..sampling.tokens.max(1)).map(|at| (at / sequence_tokens) as u32).collect(),
            sequence_tokens,
            seed: sampling.seed,
            text_fingerprint: 0,
        }
    }

    /// The first `tokens` tokens.
    pub fn head(&self, tokens: usize) -> Self {
        let tokens = tokens.min(self.tokens.len());
        let before = self.sequences.iter().copied().take_while(|&s| (s as usize) < tokens);
        Self {
            tokens: self.tokens[..tokens].to_vec(),
            sequences: before.chain([tokens as u32]).collect(),
            documents: self.documents[..tokens].to_vec(),
            ..*self
        }
    }

    /// Names the recording that these ids and this checkpoint give.
    pub fn id(&self, checkpoint: &Checkpoint) -> String {
        let mut bytes: Vec<u8> = Vec::with_capacity(self.tokens.len() * 4 + 64);
        bytes.extend(self.tokens.iter().chain(&self.sequences).chain(&self.documents).flat_map(|v| v.to_le_bytes()));
        bytes.extend(checkpoint_fingerprint(checkpoint).as_bytes());
        format!("{:016x}", checksum(&bytes))
    }
}

/// Names a checkpoint by its files: names, lengths, architecture, and pieces of the contents, 8 MiB of a file at most.
pub fn checkpoint_fingerprint(checkpoint: &Checkpoint) -> String {
    let mut text = format!("{:?}", checkpoint.spec());
    for file in checkpoint.files() {
        let sample = sample(&checkpoint.dir().join(&file.name), file.bytes);
        text += &format!("|{} {} {sample:016x}", Path::new(&file.name).display(), file.bytes);
    }
    format!("{:016x}", checksum(text.as_bytes()))
}

/// Hash of pieces of a file, all over it: another training of the same model differs in every one of them. What cannot be read
/// counts as empty; whoever needs it says so.
fn sample(path: &Path, bytes: u64) -> u64 {
    const PIECES: u64 = 256;
    const PIECE_BYTES: u64 = 32 << 10;
    let mut hash = Xxh3::new();
    let Ok(file) = open_regular(path) else { return hash.digest() };
    let mut piece = vec![0; PIECE_BYTES as usize];
    let step = (bytes / PIECES).max(PIECE_BYTES);
    let mut at = 0;
    while at < bytes {
        let piece = &mut piece[..PIECE_BYTES.min(bytes - at) as usize];
        if file.read_exact_at(piece, at).is_err() {
            break;
        }
        hash.update(piece);
        at += step;
    }
    hash.digest()
}

/// Fisher-Yates with splitmix64.
fn shuffle(items: &mut [usize], seed: u64) {
    let mut state = seed;
    for i in (1..items.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        items.swap(i, (z % (i as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_stand_between_separator_lines() {
        let text = "one\ntwo\n<|endoftext|>\nthree <|endoftext|> still\n<|endoftext|>\n\n<|endoftext|>\nfour";
        assert_eq!(split(text), ["one\ntwo", "three <|endoftext|> still", "four"]);
    }

    #[test]
    fn heads_end_in_the_middle_of_a_sequence() {
        let whole = Calibration {
            tokens: (0..10).collect(),
            sequences: vec![0, 4, 8, 10],
            documents: vec![0, 0, 0, 0, 1, 1, 1, 1, 2, 2],
            sequence_tokens: 4,
            seed: 1,
            text_fingerprint: 0,
        };
        let head = whole.head(6);
        assert_eq!((head.tokens.len(), head.sequences, head.documents.len()), (6, vec![0, 4, 6], 6));
        assert_eq!(whole.head(8).sequences, [0, 4, 8]);
        assert_eq!(whole.head(99).sequences, whole.sequences);
    }

    #[test]
    fn shuffling_permutes_and_repeats() {
        let mut a: Vec<usize> = (0..100).collect();
        shuffle(&mut a, 3);
        let mut b: Vec<usize> = (0..100).collect();
        shuffle(&mut b, 3);
        assert_eq!(a, b);
        a.sort_unstable();
        assert_eq!(a, (0..100).collect::<Vec<_>>());
        assert_ne!(a, b);
    }
}
