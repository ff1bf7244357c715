//! Recorded activity as the sets that analysis and ordering work on.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use flashlm_formats::recording::Recording;

/// Share of the documents that is held out where nothing else is asked for.
pub(crate) const HELD_OUT: f64 = 0.1;

/// Which tokens of a recording are trained on and which are held out.
pub(crate) struct Division {
    /// Stretches of tokens, in order.
    pub(crate) training: Vec<Range<usize>>,
    /// The others.
    pub(crate) held_out: Vec<Range<usize>>,
}

impl Division {
    /// All tokens in one part.
    pub(crate) fn whole(recording: &Recording) -> Vec<Range<usize>> {
        std::iter::once(0..recording.tokens().len()).collect()
    }

    /// Holds out about `share` of the documents, chosen by `seed`; tokens of one document are parted only where no documents
    /// can be.
    pub(crate) fn by_document(documents: &[u32], share: f64, seed: u64) -> Self {
        let mut division = Division { training: Vec::new(), held_out: Vec::new() };
        let mut start = 0;
        for document in documents.chunk_by(|a, b| a == b) {
            let end = start + document.len();
            let chance = (mix(seed ^ mix(document[0] as u64)) >> 11) as f64 / (1u64 << 53) as f64;
            let part = if chance < share { &mut division.held_out } else { &mut division.training };
            match part.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => part.push(start..end),
            }
            start = end;
        }
        if division.training.is_empty() || division.held_out.is_empty() {
            // A few long documents: the text's end is held out instead.
            let cut = documents.len() - (documents.len() as f64 * share).ceil() as usize;
            division = Division {
                training: std::iter::once(0..cut).collect(),
                held_out: std::iter::once(cut..documents.len()).collect(),
            };
        }
        division
    }
}

/// SplitMix64's mixing function: the same choice on every machine.
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Reads `3`, `2..5` (2, 3, 4), `2..` and `..5`.
pub(crate) fn layer_range(text: Option<&str>, recording: &Recording) -> Result<Vec<usize>> {
    let layers = recording.info().model.layers;
    let chosen = match text {
        None => 0..layers,
        Some(text) => {
            let number = |part: &str, default| if part.is_empty() { Ok(default) } else { part.parse::<usize>() };
            let range = match text.split_once("..") {
                Some((from, to)) => number(from, 0).and_then(|f| Ok(f..number(to, layers)?)),
                None => text.parse::<usize>().map(|l| l..l + 1),
            };
            range.with_context(|| format!("--layers {text}: expected a layer, or a range such as 2..5"))?
        }
    };
    if chosen.is_empty() || chosen.end > layers {
        bail!("--layers {}..{}: the model has layers 0..{layers}", chosen.start, chosen.end);
    }
    let here: Vec<usize> = chosen.clone().filter(|&l| recording.has_layer(l)).collect();
    if text.is_some() && here.len() < chosen.len() {
        bail!("{} holds only some of the layers {}..{}", recording.dir().display(), chosen.start, chosen.end);
    }
    ensure!(!here.is_empty(), "{} holds no layers; record some first", recording.dir().display());
    Ok(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_stay_whole_and_every_token_is_somewhere() {
        let documents: Vec<u32> = (0..1000).map(|t| t / 7).collect();
        let division = Division::by_document(&documents, 0.3, 5);
        let mut part = vec![0; documents.len()];
        division.training.iter().cloned().flatten().for_each(|t| part[t] += 1);
        division.held_out.iter().cloned().flatten().for_each(|t| part[t] += 2);
        assert!(part.iter().all(|&p| p == 1 || p == 2));
        for t in 1..documents.len() {
            assert!(documents[t] != documents[t - 1] || part[t] == part[t - 1], "token {t}");
        }
        let held_out = part.iter().filter(|&&p| p == 2).count();
        assert!((200..400).contains(&held_out), "{held_out} of 1000 held out");
        // A single document is cut.
        let one = Division::by_document(&[1; 10], 0.3, 5);
        assert_eq!((one.training[0].clone(), one.held_out[0].clone()), (0..7, 7..10));
    }
}
