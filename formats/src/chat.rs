//! What a model's publisher says of talking to it: chat templates, the texts of special tokens, how tokens are to be chosen.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most bytes of all templates; the longest published ones have some 30 kB.
pub const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Most templates.
pub const TEMPLATES_MAX: usize = 64;
/// Longest special token.
pub const SPECIAL_TOKEN_BYTES_MAX: usize = 1024;

/// The name of the template that is used where no other is asked for.
pub const DEFAULT_TEMPLATE: &str = "default";
/// The name of the template that is used with tools, where there is one.
pub const TOOL_TEMPLATE: &str = "tool_use";

/// How a conversation becomes text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    /// Jinja templates by name.
    pub templates: BTreeMap<String, String>,
    /// Texts of special tokens by the names that templates know them by, such as `bos_token`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub special_tokens: BTreeMap<String, String>,
}

impl Chat {
    /// The template for a conversation, with tools or without; `None` where nothing says which.
    pub fn template(&self, tools: bool) -> Option<&str> {
        let of = |name: &str| self.templates.get(name).map(String::as_str);
        let tools = if tools { of(TOOL_TEMPLATE) } else { None };
        tools.or_else(|| of(DEFAULT_TEMPLATE))
    }

    /// What is beyond the limits: what it is, what is allowed, and what is there.
    pub fn excess(&self) -> Option<(&'static str, usize, usize)> {
        let bytes = self.templates.iter().map(|(name, template)| name.len() + template.len()).sum();
        let token = self.special_tokens.iter().flat_map(|(name, token)| [name.len(), token.len()]).max();
        let limits = [
            ("number of chat templates", TEMPLATES_MAX, self.templates.len()),
            ("bytes of chat templates", TEMPLATE_BYTES_MAX, bytes),
            ("number of special tokens", TEMPLATES_MAX, self.special_tokens.len()),
            ("bytes of a special token", SPECIAL_TOKEN_BYTES_MAX, token.unwrap_or(0)),
        ];
        limits.into_iter().find(|(_, most, found)| found > most)
    }
}

/// How the next token is chosen where the user says nothing, as the publisher recommends. What is left out changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplingDefaults {
    /// Randomness of the choice; greedy without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Choose among so many of the likeliest only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Choose among the likeliest that together have this probability.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Make tokens already seen less likely.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
}

impl SamplingDefaults {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The first number that nothing can be chosen by, with its name and what would do.
    pub fn fault(&self) -> Option<(&'static str, &'static str, f32)> {
        let Self { temperature, top_p, repetition_penalty, .. } = *self;
        let temperature = temperature.filter(|t| !(t.is_finite() && *t >= 0.0));
        let top_p = top_p.filter(|p| !(0.0..=1.0).contains(p));
        let penalty = repetition_penalty.filter(|r| !(r.is_finite() && *r > 0.0));
        temperature
            .map(|found| ("temperature", "a number not below 0", found))
            .or(top_p.map(|found| ("top_p", "0 to 1", found)))
            .or(penalty.map(|found| ("repetition_penalty", "a number above 0", found)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_have_a_template_of_their_own_where_there_is_one() {
        let chat = |names: &[&str]| Chat {
            templates: names.iter().map(|name| ((*name).to_owned(), format!("{name}!"))).collect(),
            ..Chat::default()
        };
        assert_eq!(chat(&["default", "tool_use"]).template(true), Some("tool_use!"));
        assert_eq!(chat(&["default", "tool_use"]).template(false), Some("default!"));
        assert_eq!(chat(&["default"]).template(true), Some("default!"));
        assert_eq!(chat(&["rag"]).template(false), None);
    }

    #[test]
    fn what_is_too_much_is_named() {
        let mut chat = Chat::default();
        assert_eq!(chat.excess(), None);
        chat.special_tokens.insert("bos_token".into(), "x".repeat(SPECIAL_TOKEN_BYTES_MAX + 1));
        assert_eq!(chat.excess(), Some(("bytes of a special token", SPECIAL_TOKEN_BYTES_MAX, 1025)));
        chat.templates.insert("default".into(), "x".repeat(TEMPLATE_BYTES_MAX));
        assert_eq!(chat.excess().map(|(what, ..)| what), Some("bytes of chat templates"));
    }

    #[test]
    fn numbers_that_choose_nothing_are_named() {
        let sound = SamplingDefaults { temperature: Some(0.0), top_p: Some(1.0), ..SamplingDefaults::default() };
        assert_eq!(sound.fault(), None);
        for (broken, name) in [
            (SamplingDefaults { temperature: Some(f32::NAN), ..sound }, "temperature"),
            (SamplingDefaults { temperature: Some(-1.0), ..sound }, "temperature"),
            (SamplingDefaults { top_p: Some(1.5), ..sound }, "top_p"),
            (SamplingDefaults { repetition_penalty: Some(0.0), ..sound }, "repetition_penalty"),
        ] {
            assert_eq!(broken.fault().map(|(name, ..)| name), Some(name));
        }
    }
}
