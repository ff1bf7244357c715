//! A turn of a conversation, written as the model's chat template writes it.

use super::generation::Generation;
use super::model::Model;
use super::session::Session;
use crate::chat::{ChatTemplate, Message, Rendered, Tools};
use crate::error::{Result, RuntimeError};
use crate::sampler::Sampling;

impl Model {
    /// How conversations are written for the model, with tools or without; `None` where its publisher does not say.
    ///
    /// # Errors
    /// `ChatTemplate`, with what is wrong with it.
    pub fn chat_template(&self, tools: bool) -> Result<Option<ChatTemplate>> {
        let chat = self.bundle().manifest().chat.as_ref();
        Ok(chat.map(|chat| ChatTemplate::of(chat, tools, self.tokenizer())).transpose()?.flatten())
    }

    /// How the model's publisher wants tokens to be chosen; greedy where that is not said.
    pub fn recommended_sampling(&self) -> Sampling {
        Sampling::recommended(&self.bundle().manifest().sampling)
    }
}

impl<'m> Session<'m> {
    /// Lets the model answer a conversation: its messages as `template` writes them. What the session has of them is not computed
    /// again, so that each further turn of a conversation costs that turn alone.
    ///
    /// # Errors
    /// `Chat` where the template has something against the messages, `Tokenizer`, `ContextFull`.
    pub fn chat(
        &mut self,
        template: &ChatTemplate,
        messages: &[Message],
        tools: Option<&Tools>,
    ) -> Result<Generation<'_, 'm>> {
        let rendered = template.render(self.model.tokenizer(), messages, tools, true)?;
        let ids = self.ids_of(&rendered)?;
        self.answer(Some(template), &ids, Some(rendered.text().into_owned()))
    }

    /// The ids of a conversation. Where it goes on after what was said, that has the ids with which it was said: those of an answer are
    /// as the model chose them, and its text might be cut into others.
    ///
    /// # Errors
    /// `Tokenizer`.
    pub fn ids_of(&self, rendered: &Rendered) -> Result<Vec<u32>> {
        let tokenizer = self.model.tokenizer();
        let rest = self.written.as_ref().and_then(|written| rendered.after(written));
        match rest.filter(|rest| rest.begins_anew(tokenizer)) {
            Some(rest) => Ok([self.ids(), &rest.ids(tokenizer)?].concat()),
            None => rendered.ids(tokenizer),
        }
    }

    /// Says `ids` instead of what was said, of which their common beginning stays, and lets the model go on; with a template, until
    /// that ends an answer. `text` is theirs, where they are of a conversation.
    ///
    /// # Errors
    /// `EmptyPrompt`, `ContextFull`.
    pub fn answer(
        &mut self,
        template: Option<&ChatTemplate>,
        ids: &[u32],
        text: Option<String>,
    ) -> Result<Generation<'_, 'm>> {
        let (context, model_max) = (self.context(), self.model.spec().max_positions);
        if ids.len() > context {
            return Err(RuntimeError::ContextFull { wanted: ids.len(), context, model_max });
        }
        let said = self.keep(ids);
        let generation = self.generate_until(&ids[said..], template.map_or(&[], ChatTemplate::ends))?;
        generation.session.written = text;
        Ok(generation)
    }
}
