//! Calibration text: documents, sampled, cut into sequences of token ids, and divided into those to train on and those held out.

use std::collections::HashMap;

use flashlm::error::RuntimeError;
use flashlm::text::Tokenizer;
use flashlm_formats::bundle::checksum;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::recording::{Split, hold_out};
use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use xxhash_rust::xxh3::Xxh3;

use super::documents::{Documents, SEPARATOR, pieces};

/// Tokens that anything can be learned from.
const NEEDED: usize = 256;
/// What is held out or trained on as a whole has at most one part in this many of the tokens.
const UNITS: usize = 10;
/// Bytes of text to a token, about: for how finely long documents are cut before they are tokenized.
const TOKEN_BYTES: usize = 4;
/// Shortest piece that is worth cutting, and longest that is tokenized at once.
const PIECE_BYTES_MIN: usize = 128;
const PIECE_BYTES_MAX: usize = 64 << 10;

/// The calibration text cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// There is hardly any text.
    #[error(
        "the text has only {tokens} tokens (documents: {documents}); at least {NEEDED} are needed, and 20000 or more work \
         well (documents are separated by lines {SEPARATOR}, or are files of their own)"
    )]
    TooShort {
        /// Tokens found.
        tokens: usize,
        /// Documents found.
        documents: usize,
    },
    /// Hardly any text is asked for.
    #[error("{asked} tokens were requested; at least {NEEDED} are needed, and 20000 or more work well")]
    TooFewAsked {
        /// Tokens asked for.
        asked: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] RuntimeError),
}

/// How calibration text is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to take at most.
    pub tokens: usize,
    /// Longest sequence.
    pub sequence_tokens: usize,
    /// Order of the documents; 0 keeps that of the files.
    pub seed: u64,
    /// Share of the tokens to hold out, usually [`flashlm_formats::recording::HELD_OUT`].
    pub held_out: f64,
}

/// Token ids in sequences.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    /// All ids, sequence after sequence.
    pub tokens: Vec<u32>,
    /// Where sequences begin, and the number of tokens.
    pub sequences: Vec<u32>,
    /// For every token the number of its document, or of its piece of a long one. No sequence has tokens of two.
    pub documents: Vec<u32>,
    /// Numbers of the documents that nothing may be trained on, ascending.
    pub held_out: Vec<u32>,
    /// Longest sequence allowed.
    pub sequence_tokens: usize,
    /// Seed of the sampling.
    pub seed: u64,
    /// Hash of the text.
    pub text_fingerprint: u64,
    /// What has to be said about the text, in sentences.
    pub notes: Vec<String>,
}

/// What was taken of a document, or of a piece of one.
struct Taken {
    document: usize,
    /// Number of the piece in the document.
    piece: usize,
    ids: Vec<u32>,
}

/// What is between two texts, and in front of one that is made of nothing: what the tokenizer puts in front of every text;
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
    /// Tokenises documents in a seeded order until there are enough tokens, and decides what is held out.
    ///
    /// A document of more than a tenth of the tokens is cut into pieces, which come in an order of their own and are held out or
    /// trained on each by itself: else one document could be all there is to learn from, or all there is to judge by.
    ///
    /// # Errors
    /// If there is too little text, or the tokenizer cannot take it.
    pub fn new(
        documents: &Documents,
        tokenizer: &Tokenizer,
        spec: &ModelSpec,
        sampling: Sampling,
    ) -> Result<Self, TextError> {
        if sampling.tokens < NEEDED {
            return Err(TextError::TooFewAsked { asked: sampling.tokens });
        }
        let texts = &documents.texts;
        let bytes: usize = texts.iter().map(String::len).sum();
        let longest =
            (sampling.tokens.saturating_mul(TOKEN_BYTES).min(bytes) / UNITS).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX);
        let mut order: Vec<(usize, usize, &str)> = Vec::new();
        for (document, text) in texts.iter().enumerate() {
            let parts = pieces(text, longest).into_iter().map(|part| part.trim_matches(['\n', '\r'])).enumerate();
            order.extend(parts.map(|(piece, text)| (document, piece, text)));
        }
        if sampling.seed != 0 {
            shuffle(&mut order, sampling.seed);
        }

        // As a prompt begins, and every sequence of a long document too.
        let first = tokenizer.first_ids();
        let room = |sequence_tokens: usize| sequence_tokens.saturating_sub(first.len()).max(1);
        let sequence_tokens = sampling.sequence_tokens.min(spec.max_positions).max(2);
        let (mut taken, mut count) = (Vec::new(), 0);
        for (document, piece, text) in order {
            let ids = tokenizer.encode_bare(text)?;
            count += ids.len() + first.len() * ids.len().div_ceil(room(sequence_tokens));
            taken.push(Taken { document, piece, ids });
            if count >= sampling.tokens {
                break;
            }
        }
        if count < NEEDED {
            return Err(TextError::TooShort { tokens: count, documents: texts.len() });
        }
        let mut calibration = Self { sequence_tokens, seed: sampling.seed, ..Self::default() };
        let cut = calibration.fill(taken, [first, &between_texts(tokenizer, spec)], count.min(sampling.tokens));
        calibration.hold_out(sampling.held_out);
        let mut fingerprint = Xxh3::new();
        texts.iter().for_each(|text| [text.as_bytes(), &[0]].iter().for_each(|bytes| fingerprint.update(bytes)));
        calibration.text_fingerprint = fingerprint.digest();

        if count < sampling.tokens {
            calibration.notes.push(format!("the text has {count} tokens, and {} were requested", sampling.tokens));
        }
        if cut > 0 {
            calibration.notes.push(format!(
                "documents longer than a tenth of what is used, {cut} of {}, are cut into pieces where paragraphs, lines or sentences \
                 end, and some of the pieces are held out (documents are separated by lines {SEPARATOR}, or are files of their own)",
                texts.len()
            ));
        }
        Ok(calibration)
    }

    /// Takes in `tokens` tokens of `taken`, and gives the number of documents that were too long to stay whole.
    ///
    /// Sequences begin as a prompt does, or, each second document, as a text does that comes after another. Only where a tokenizer
    /// puts nothing in front of a prompt is that not the same, and then predictors have to know both.
    fn fill(&mut self, mut taken: Vec<Taken>, [first, between]: [&[u32]; 2], tokens: usize) -> usize {
        // Documents in the order in which they were met, each from its beginning on.
        let (mut rank, mut sizes) = (HashMap::new(), HashMap::new());
        for part in &taken {
            let next = rank.len();
            rank.entry(part.document).or_insert(next);
            *sizes.entry(part.document).or_insert(0) += part.ids.len();
        }
        taken.sort_by_key(|part| (rank[&part.document], part.piece));

        let unit_tokens = tokens / UNITS;
        self.sequences.push(0);
        // Tokens of the last unit: a document, or a part of one.
        let (mut number, mut filled, mut previous, mut cut) = (0, 0, None, 0);
        for part in taken {
            let whole = sizes[&part.document] <= unit_tokens;
            let is_new = previous.replace(part.document) != Some(part.document);
            cut += usize::from(is_new && !whole);
            if filled > 0 && (is_new || !whole) {
                (number, filled) = (number + 1, 0);
            }
            let longest = if whole { self.sequence_tokens } else { self.sequence_tokens.min(unit_tokens) };
            let first = if part.piece == 0 && rank[&part.document] % 2 == 1 { between } else { first };
            for ids in part.ids.chunks(longest.saturating_sub(first.len()).max(1)) {
                let taken = (first.len() + ids.len()).min(tokens - self.tokens.len());
                if taken <= first.len() {
                    break;
                }
                if !whole && filled > 0 && filled + taken > unit_tokens {
                    (number, filled) = (number + 1, 0);
                }
                filled += taken;
                self.tokens.extend_from_slice(first);
                self.tokens.extend_from_slice(&ids[..taken - first.len()]);
                self.documents.resize(self.tokens.len(), number);
                self.sequences.push(self.tokens.len() as u32);
            }
        }
        cut
    }

    /// Chooses the documents that are held out.
    fn hold_out(&mut self, share: f64) {
        let spans: Vec<&[u32]> = self.documents.chunk_by(|a, b| a == b).collect();
        let lengths: Vec<usize> = spans.iter().map(|span| span.len()).collect();
        // Only so few tokens that they cannot be divided are left.
        let last = || (0..lengths.len()).map(|number| number > 0 && number + 1 == lengths.len()).collect();
        let chosen = hold_out(&lengths, share).unwrap_or_else(last);
        self.held_out = spans.iter().zip(chosen).filter(|(_, held)| *held).map(|(span, _)| span[0]).collect();
    }

    /// Which tokens are trained on, and which are held out.
    pub fn split(&self) -> Split {
        Split::of_documents(&self.documents, &self.held_out)
    }

    /// The token ranges of the sequences, in order.
    pub fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.sequences.windows(2).map(|w| w[0] as usize..w[1] as usize)
    }

    /// Evenly distributed ids in full sequences, each a document of its own: for models whose weights mean nothing.
    pub fn random(spec: &ModelSpec, sampling: Sampling) -> Self {
        let tokens = sampling.tokens.max(1);
        // Ten sequences at least, so that some can be held out.
        let longest = sampling.sequence_tokens.min(spec.max_positions).min(tokens.div_ceil(UNITS));
        let sequence_tokens = longest.max(2);
        let first = begins_by_configuration(spec);
        let offsets = (0..tokens).step_by(sequence_tokens).map(|at| at as u32);
        let id = |at: usize| match first {
            Some(first) if at.is_multiple_of(sequence_tokens) => first,
            _ => {
                let random = checksum(&[sampling.seed.to_le_bytes(), (at as u64).to_le_bytes()].concat());
                ((u128::from(random) * spec.vocab_size as u128) >> 64) as u32
            }
        };
        let mut calibration = Self {
            tokens: (0..tokens).map(id).collect(),
            sequences: offsets.chain([tokens as u32]).collect(),
            documents: (0..tokens).map(|at| (at / sequence_tokens) as u32).collect(),
            sequence_tokens,
            seed: sampling.seed,
            ..Self::default()
        };
        calibration.hold_out(sampling.held_out);
        calibration
    }

    /// At most `tokens` tokens from the beginning of either part, `share` of them from what is held out if there are so many.
    pub fn sample(&self, tokens: usize, share: f64) -> Self {
        let held = self.split().flags(self.tokens.len());
        let there = held.iter().filter(|held| **held).count();
        let held_out = ((tokens as f64 * share) as usize).min(there);
        let mut left = [tokens - held_out.min(tokens), held_out];
        let mut sample =
            Self { sequences: vec![0], sequence_tokens: self.sequence_tokens, seed: self.seed, ..Self::default() };
        sample.text_fingerprint = self.text_fingerprint;
        for range in self.ranges() {
            let left = &mut left[usize::from(held[range.start])];
            let range = range.start..range.end.min(range.start.saturating_add(*left));
            if range.is_empty() {
                continue;
            }
            *left -= range.len();
            sample.tokens.extend_from_slice(&self.tokens[range.clone()]);
            sample.documents.extend_from_slice(&self.documents[range]);
            sample.sequences.push(sample.tokens.len() as u32);
        }
        let there = |number: &&u32| sample.documents.binary_search(number).is_ok();
        sample.held_out = self.held_out.iter().filter(there).copied().collect();
        sample
    }

    /// Names the recording that these ids and this checkpoint give.
    pub fn id(&self, checkpoint: &Checkpoint) -> String {
        let mut bytes: Vec<u8> = Vec::with_capacity(self.tokens.len() * 4 + 64);
        let numbers = [&self.tokens, &self.sequences, &self.documents, &self.held_out];
        bytes.extend(numbers.into_iter().flatten().flat_map(|v| v.to_le_bytes()));
        bytes.extend(checkpoint.fingerprint().as_bytes());
        format!("{:016x}", checksum(&bytes))
    }
}

/// Fisher and Yates; the seed decides what is recorded.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut random = SplitMix64::seed_from_u64(seed);
    for i in (1..items.len()).rev() {
        items.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A tokenizer of words that puts id 2 in front of every text, and some model.
    fn tools() -> (Tokenizer, ModelSpec) {
        let vocab: serde_json::Map<_, _> = (0..100).map(|id| (format!("w{id}"), id.into())).collect();
        let mut json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w3" },
        });
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }],
            "single": [{ "SpecialToken": { "id": "w2", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "special_tokens": { "w2": { "id": "w2", "ids": [2], "tokens": ["w2"] } },
        });
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-opt");
        let spec = Checkpoint::open(root).unwrap().spec().clone();
        (Tokenizer::from_json(json.to_string().as_bytes()).unwrap(), spec)
    }

    fn words(count: usize, word: usize) -> String {
        (0..count).map(|at| format!("w{}{}", 4 + (word + at) % 90, if at % 12 == 11 { ".\n" } else { " " })).collect()
    }

    fn sampled(texts: Vec<String>, tokens: usize) -> Result<Calibration, TextError> {
        let (tokenizer, spec) = tools();
        let sampling = Sampling { tokens, sequence_tokens: 128, seed: 1, held_out: 0.1 };
        Calibration::new(&Documents { texts, notes: Vec::new() }, &tokenizer, &spec, sampling)
    }

    /// What no text may break: documents whole, both parts large enough, sequences within one document.
    fn check(calibration: &Calibration, what: &str) {
        let Calibration { tokens, sequences, documents, .. } = calibration;
        assert!(tokens.len() == documents.len() && *sequences.last().unwrap() as usize == tokens.len(), "{what}");
        for range in calibration.ranges() {
            assert!(!range.is_empty() && range.len() <= 128 && tokens[range.start] == 2, "{what}: {range:?}");
            assert_eq!(documents[range.start], documents[range.end - 1], "{what}");
        }
        let split = calibration.split();
        let share = Split::tokens(&split.held_out) as f64 / tokens.len() as f64;
        assert!((0.05..=0.151).contains(&share), "{what}: {share} held out");
    }

    #[test]
    fn every_kind_of_text_is_split_with_both_parts_large_enough() {
        let many: Vec<String> = (0..60).map(|d| words(20 + d * 7 % 90, d)).collect();
        for tokens in [256, 300, 999, 2500] {
            for (what, texts, cut) in [
                ("one long document", vec![words(9000, 0)], true),
                ("three long documents", (0..3).map(|d| words(4000, d)).collect(), true),
                ("a short note beside a book", vec![words(8, 0), words(9000, 1)], true),
                ("a book without any place to cut", vec!["w5".repeat(3000), words(3000, 1)], true),
                ("many documents", many.clone(), false),
            ] {
                let calibration = sampled(texts, tokens).unwrap_or_else(|e| panic!("{what}, {tokens}: {e}"));
                let what = format!("{what}, {tokens} tokens");
                check(&calibration, &what);
                assert!(
                    calibration.tokens.len() <= tokens && calibration.tokens.len() + 200 > tokens.min(3000),
                    "{what}"
                );
                assert!(!cut || calibration.notes.iter().any(|note| note.contains(SEPARATOR)), "{what}");
            }
        }
        // Of three books each is trained on, whichever comes first.
        let words_of = |calibration: &Calibration| -> std::collections::BTreeSet<u32> {
            let training = calibration.split().training;
            training.into_iter().flatten().map(|t| calibration.tokens[t]).filter(|id| *id > 3).collect()
        };
        let three = (0..3).map(|d| format!("w{} ", 10 + d).repeat(5000)).collect();
        assert_eq!(words_of(&sampled(three, 600).unwrap()).into_iter().collect::<Vec<_>>(), [10, 11, 12]);
    }

    #[test]
    fn what_is_asked_and_what_there_is_are_told_apart() {
        let said = |texts, tokens| sampled(texts, tokens).unwrap_err().to_string();
        assert!(said(vec![words(9000, 0)], 255).contains("255 tokens were requested; at least 256"));
        let short = said(vec![words(100, 0), words(60, 1)], 2000);
        assert!(short.contains("the text has only 16") && short.contains("(documents: 2); at least 256"), "{short}");
        assert!(short.contains(SEPARATOR));
        let enough = sampled(vec![words(300, 0), words(60, 1)], 2000).unwrap();
        assert!(enough.notes[0].contains("tokens, and 2000 were requested"), "{:?}", enough.notes);
        check(&enough, "a short text");
    }

    #[test]
    fn samples_have_both_parts() {
        let whole = sampled((0..60).map(|d| words(60, d)).collect(), 2500).unwrap();
        let held = |c: &Calibration| Split::tokens(&c.split().held_out);
        let pilot = whole.sample(600, 0.1);
        assert_eq!((pilot.tokens.len(), held(&pilot)), (600, 60));
        let half = whole.sample(600, 0.5);
        assert_eq!((half.tokens.len(), held(&half)), (600, held(&whole).min(300)));
        assert!(half.held_out.iter().all(|document| whole.held_out.contains(document)));
        let all = whole.sample(usize::MAX, 0.1);
        assert_eq!((&all.tokens, &all.sequences, &all.held_out), (&whole.tokens, &whole.sequences, &whole.held_out));
        assert_ne!(pilot.documents, half.documents);
    }

    #[test]
    fn random_ids_are_split_as_well() {
        let (_, spec) = tools();
        for tokens in [1, 2, 30, 60, 1536, 20_000] {
            let sampling = Sampling { tokens, sequence_tokens: 256, seed: 1, held_out: 0.1 };
            let calibration = Calibration::random(&spec, sampling);
            assert_eq!(calibration.tokens.len(), tokens);
            let held_out = Split::tokens(&calibration.split().held_out) as f64;
            assert!(tokens < 30 || (0.05..=0.15).contains(&(held_out / tokens as f64)), "{held_out} of {tokens}");
        }
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
