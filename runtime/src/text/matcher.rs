//! Finding one text in a stream that comes byte by byte: Knuth, Morris and Pratt's automaton.

/// Watches for a text; each byte costs constant time on average, whatever came before.
#[derive(Clone, Debug)]
pub(super) struct Matcher {
    pattern: String,
    /// For each number of matched bytes, the longest shorter beginning that their end is, too.
    shorter: Vec<usize>,
    matched: usize,
}

impl Matcher {
    /// Watches for `pattern`, which must not be empty.
    pub(super) fn new(pattern: String) -> Self {
        let bytes = pattern.as_bytes();
        let mut shorter = vec![0; bytes.len() + 1];
        let mut matched = 0;
        for end in 1..bytes.len() {
            while matched > 0 && bytes[end] != bytes[matched] {
                matched = shorter[matched];
            }
            matched += usize::from(bytes[end] == bytes[matched]);
            shorter[end + 1] = matched;
        }
        Self { pattern, shorter, matched: 0 }
    }

    /// What is watched for.
    pub(super) fn pattern(&self) -> &str {
        &self.pattern
    }

    /// How many bytes of the pattern's beginning the stream ends with.
    pub(super) fn matched(&self) -> usize {
        self.matched
    }

    /// Takes the next byte; whether the pattern ends with it.
    pub(super) fn step(&mut self, byte: u8) -> bool {
        let bytes = self.pattern.as_bytes();
        while self.matched > 0 && bytes.get(self.matched) != Some(&byte) {
            self.matched = self.shorter[self.matched];
        }
        self.matched += usize::from(bytes.get(self.matched) == Some(&byte));
        self.matched == bytes.len()
    }

    /// Forgets what came before.
    pub(super) fn restart(&mut self) {
        self.matched = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_found() {
        for (pattern, text) in [("aa", "aaaa"), ("abab", "abababxabab"), ("a", "xax"), ("abc", "ababab"), ("é", "aéé")]
        {
            let mut matcher = Matcher::new(pattern.into());
            let ends: Vec<usize> = (0..text.len()).filter(|i| matcher.step(text.as_bytes()[*i])).collect();
            let expected: Vec<usize> =
                (0..text.len()).filter(|i| text.as_bytes()[..=*i].ends_with(pattern.as_bytes())).collect();
            assert_eq!(ends, expected, "{pattern} in {text}");
        }
    }
}
