//! Text from token ids that come one at a time.

use tokenizers::Tokenizer as HfTokenizer;

use super::stages::{Part, Stage, stages};

/// Gives text as soon as nothing can change it: the text of the prompt and all that [`push`](Self::push) gave is always a prefix of
/// what all ids together decode to, and lacks an open character at most. A token costs the same however many came before.
#[derive(Clone)]
pub struct TextStream<'a> {
    tokenizer: &'a HfTokenizer,
    stages: Vec<Stage>,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a HfTokenizer) -> Self {
        Self { tokenizer, stages: stages(tokenizer.get_decoder()) }
    }

    /// Takes ids whose text is known already: the first word of a continuation depends on what comes before it.
    pub fn prompt(&mut self, ids: &[u32]) {
        for id in ids {
            self.push(*id);
        }
    }

    /// The text that `id` completes; empty while a character is open. Special tokens have none, nor have ids that the tokenizer does not
    /// know, as padded vocabularies have them.
    pub fn push(&mut self, id: u32) -> String {
        let special = |token: &String| self.tokenizer.get_added_vocabulary().is_special_token(token);
        match self.tokenizer.id_to_token(id).filter(|token| !special(token)) {
            Some(token) => self.run(vec![Part::whole(token)], false),
            None => String::new(),
        }
    }

    /// What would be left if the stream ended here, such as replacement characters for a character that is still open.
    pub fn rest(&self) -> String {
        self.clone().finish()
    }

    /// What is left at the end.
    pub fn finish(mut self) -> String {
        self.run(Vec::new(), true)
    }

    fn run(&mut self, mut parts: Vec<Part>, end: bool) -> String {
        for stage in &mut self.stages {
            let mut out = Vec::with_capacity(parts.len() + 1);
            parts.into_iter().for_each(|part| stage.take(part, &mut out));
            if end {
                stage.end(&mut out);
            }
            parts = out;
        }
        parts.into_iter().map(|part| part.text).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::json;
    use tokenizers::Decoder as _;
    use tokenizers::decoders::DecoderWrapper;

    use super::*;
    use crate::guard::guarded;
    use crate::text::Tokenizer;

    const LLAMA: &str = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
        {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#;

    /// Decoders whose open text is at most as long as a character's bytes.
    const BOUNDED: [&str; 20] = [
        "null",
        LLAMA,
        r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true}"#,
        r#"{"type":"ByteFallback"}"#,
        r#"{"type":"Fuse"}"#,
        r#"{"type":"Metaspace","replacement":"▁","add_prefix_space":true}"#,
        r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"never"}"#,
        r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"first"}"#,
        r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###,
        r#"{"type":"WordPiece","prefix":"","cleanup":false}"#,
        r#"{"type":"BPEDecoder","suffix":"</w>"}"#,
        r#"{"type":"CTC","pad_token":"x","word_delimiter_token":"▁","cleanup":true}"#,
        r#"{"type":"Strip","content":"a","start":2,"stop":0}"#,
        r#"{"type":"Strip","content":"a","start":1,"stop":2}"#,
        r#"{"type":"Replace","pattern":{"String":"aa"},"content":"b"}"#,
        r#"{"type":"Replace","pattern":{"Regex":"a+|(?=x)"},"content":"<"}"#,
        r#"{"type":"Replace","pattern":{"String":""},"content":"-"}"#,
        r#"{"type":"Sequence","decoders":[]}"#,
        r#"{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Metaspace","replacement":"▁"}]}"#,
        r#"{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"Metaspace","replacement":"▁","prepend_scheme":"always"}]}"#,
    ];
    /// Decoders after which the rest of a token may be open, or the beginning of what a rule replaces or takes off.
    const BY_TOKEN: [&str; 4] = [
        r#"{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Replace","pattern":{"String":"aba"},"content":"▁"},
            {"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"Strip","content":" ","start":2,"stop":1}]}"#,
        r#"{"type":"Sequence","decoders":[{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true},{"type":"Sequence","decoders":[
            {"type":"Replace","pattern":{"String":"é"},"content":"e"},{"type":"Strip","content":" ","start":0,"stop":2}]}]}"#,
        r#"{"type":"BPEDecoder","suffix":""}"#,
        r#"{"type":"Sequence","decoders":[{"type":"CTC","pad_token":"a","word_delimiter_token":"x","cleanup":false},
            {"type":"Metaspace","replacement":"▁"},{"type":"BPEDecoder","suffix":"a"}]}"#,
    ];
    /// Decoders with a rule that needs the whole text, or a whole run of byte tokens.
    const UNBOUNDED: [&str; 6] = [
        r#"{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"WordPiece","prefix":"a","cleanup":true},{"type":"Fuse"}]}"#,
        r#"{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"BPEDecoder","suffix":"</w>"}]}"#,
        r#"{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"Replace","pattern":{"Regex":"a(b|x)+"},"content":"<"}]}"#,
        r#"{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true}]}"#,
        r###"{"type":"Sequence","decoders":[{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true},{"type":"WordPiece","prefix":"##","cleanup":true}]}"###,
        r#"{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"CTC","pad_token":"x","word_delimiter_token":"a","cleanup":true}]}"#,
    ];

    /// Tokens of every kind, among them bytes of whole characters and of broken ones, for `<0x..>` and for byte-level decoders.
    #[rustfmt::skip]
    const TOKENS: [&str; 44] = [
        "<s>", "a", "b", "x", "▁", "▁a", "▁▁", "a▁b", "aa", "aba", "ab", "é", "\u{fffd}", "日本", " ", " .", "##a", "##", "do", "not",
        "'s", "n't", "?", "a</w>", "</w>", "a</w>b</w>", "", "<0x0A>", "<0x61>", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>",
        "<0xFF>", "Ġ", "Ċ", "Ã", "©", "ð", "Ł", "ĺ", "Ģ",
    ];

    fn tokenizer(decoder: &str) -> Tokenizer {
        let vocab: serde_json::Map<_, _> = TOKENS.iter().zip(0..).map(|(t, id)| ((*t).into(), json!(id))).collect();
        let added = |id: usize, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false})
        };
        let json = json!({
            "version": "1.0",
            "added_tokens": [added(0, "<s>", true), added(TOKENS.len(), "<tool é>", false)],
            "decoder": serde_json::from_str::<serde_json::Value>(decoder).unwrap(),
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    /// What the library makes of all tokens at once, but for broken runs of byte tokens; `None` where it panics.
    fn whole(tokenizer: &HfTokenizer, ids: &[u32]) -> Option<String> {
        let tokens = ids.iter().filter_map(|id| tokenizer.id_to_token(*id));
        let tokens: Vec<String> = tokens.filter(|t| !tokenizer.get_added_vocabulary().is_special_token(t)).collect();
        let whole = guarded(|| match tokenizer.get_decoder() {
            Some(decoder) => chain(decoder, tokens.clone()).concat(),
            None => tokens.join(" "),
        });
        // Where no run is broken, it is what the library says.
        let library = guarded(|| tokenizer.decode(ids, true).unwrap());
        let runs = chain(&serde_json::from_str(r#"{"type":"ByteFallback"}"#).unwrap(), tokens).concat();
        if !runs.contains('\u{fffd}') {
            assert_eq!(whole, library);
        }
        whole.ok()
    }

    fn chain(decoder: &DecoderWrapper, tokens: Vec<String>) -> Vec<String> {
        match decoder {
            DecoderWrapper::Sequence(all) => {
                all.get_decoders().iter().fold(tokens, |tokens, decoder| chain(decoder, tokens))
            }
            DecoderWrapper::ByteFallback(_) => fallback(tokens),
            decoder => decoder.decode_chain(tokens).unwrap(),
        }
    }

    /// Runs of byte tokens as sentencepiece decodes them.
    fn fallback(tokens: Vec<String>) -> Vec<String> {
        let byte = |t: &String| u8::from_str_radix(t.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok();
        let runs = tokens.chunk_by(|a, b| byte(a).is_some() && byte(b).is_some());
        let decoded = runs.map(|run| {
            let bytes: Option<Vec<u8>> = run.iter().map(byte).collect();
            let Some(bytes) = bytes else { return run.concat() };
            let (mut text, mut at) = (String::new(), 0);
            while at < bytes.len() {
                let character = (1..=4).find_map(|n| std::str::from_utf8(bytes.get(at..at + n)?).ok());
                text += character.unwrap_or("\u{fffd}");
                at += character.map_or(1, str::len);
            }
            text
        });
        decoded.collect()
    }

    /// Pushes `ids`, split into prompt and continuation everywhere, and holds all that is shown against the whole.
    fn check(tokenizer: &Tokenizer, ids: &[u32], open: usize) {
        let Some(all) = whole(&tokenizer.inner, ids) else { return };
        assert_eq!(tokenizer.decode(ids), all);
        let mut prompt = String::new();
        let mut stream = tokenizer.stream(&[]);
        for split in 0..=ids.len() {
            let mut shown = prompt.clone();
            let mut continued = tokenizer.stream(&ids[..split]);
            ids[split..].iter().for_each(|id| shown += &continued.push(*id));
            assert_eq!(shown + &continued.finish(), all, "split at {split}");
            let Some(id) = ids.get(split) else { break };
            prompt += &stream.push(*id);
            assert!(all.starts_with(&prompt), "{prompt:?} of {all:?}");
            let rest = stream.rest();
            if let Some(so_far) = whole(&tokenizer.inner, &ids[..=split]) {
                assert_eq!(format!("{prompt}{rest}"), so_far);
            }
            assert!(rest.chars().count() <= open, "{rest:?} is held back");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn shown_text_is_what_all_ids_decode_to(ids in prop::collection::vec(0..TOKENS.len() as u32 + 3, 0..14)) {
            for decoder in BOUNDED {
                check(&tokenizer(decoder), &ids, 3);
            }
            for decoder in BY_TOKEN {
                check(&tokenizer(decoder), &ids, 12);
            }
            for decoder in UNBOUNDED {
                check(&tokenizer(decoder), &ids, usize::MAX);
            }
        }

        #[test]
        fn so_it_is_for_broken_bytes(ids in prop::collection::vec(27..36_u32, 0..14)) {
            check(&tokenizer(LLAMA), &ids, 3);
            check(&tokenizer(BOUNDED[18]), &ids, 3);
        }

        #[test]
        fn so_it_is_for_real_vocabularies(ids in prop::collection::vec(prop_oneof![0..4200_u32, 4..260_u32], 0..24)) {
            for json in ["examples/tiny-opt/tokenizer.json", "tests/fixtures/tiny-falcon/tokenizer.json"] {
                let json = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(json)).unwrap();
                check(&Tokenizer::from_json(&json).unwrap(), &ids, 3);
            }
        }
    }

    fn id(token: &str) -> u32 {
        TOKENS.iter().position(|t| *t == token).unwrap() as u32
    }

    #[test]
    fn text_goes_on_after_broken_bytes_and_keeps_its_first_space() {
        let tokenizer = tokenizer(LLAMA);
        let mut stream = tokenizer.stream(&[id("<s>"), id("▁a")]);
        let shown: Vec<String> =
            ["▁a", "<0x0A>", "<0xF0>", "<0x9F>", "x", "▁a"].iter().map(|token| stream.push(id(token))).collect();
        assert_eq!(shown, [" a", "\n", "", "", "\u{fffd}\u{fffd}x", " a"]);
        let mut alone = tokenizer.stream(&[id("<s>")]);
        assert_eq!(alone.push(id("▁a")) + &alone.push(id("▁a")), "a a", "a text's own first space is none");
    }

    #[test]
    fn endless_broken_text_comes_as_it_is_made() {
        // Decoding the whole run again for every token, this would take days.
        for (decoder, token) in
            [(LLAMA, "<0xFF>"), (LLAMA, "<0xF0>"), (LLAMA, "\u{fffd}"), (BOUNDED[2], "ð"), (BOUNDED[2], "Ģ")]
        {
            let tokenizer = tokenizer(decoder);
            let mut stream = tokenizer.stream(&[]);
            let mut shown = 0;
            for pushed in 1..=100_000 {
                shown += stream.push(id(token)).chars().count();
                assert!(shown + 1 >= pushed, "{token} of {decoder}");
            }
        }
    }
}
