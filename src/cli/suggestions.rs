//! Suggestions for words of the command line that do not exist.
//!
//! Owns which suggestions are kept. Does not know the words: clap makes the suggestions, also for words that have little in
//! common, such as `cluster-init` for `ls`.

use clap::Error;
use clap::error::{ContextKind, ContextValue};

/// Each kind of wrong word, with the kind of its suggestions.
const KINDS: [(ContextKind, ContextKind); 2] = [
    (ContextKind::InvalidSubcommand, ContextKind::SuggestedSubcommand),
    (ContextKind::InvalidValue, ContextKind::SuggestedValue),
];

/// Removes the suggestions that differ from the word in more than a typing error.
pub(super) fn without_far_ones(mut error: Error) -> Error {
    for (wrong, suggested) in KINDS {
        let Some(ContextValue::String(word)) = error.get(wrong) else { continue };
        let is_near =
            |other: &String| strsim::damerau_levenshtein(word, other) <= (word.chars().count() / 3).max(1);
        let kept = match error.get(suggested) {
            Some(ContextValue::String(other)) => {
                Some(other.clone()).filter(is_near).map(ContextValue::String)
            }
            Some(ContextValue::Strings(others)) => {
                let near: Vec<String> = others.iter().filter(|other| is_near(other)).cloned().collect();
                Some(near).filter(|near| !near.is_empty()).map(ContextValue::Strings)
            }
            _ => continue,
        };
        match kept {
            Some(kept) => drop(error.insert(suggested, kept)),
            None => drop(error.remove(suggested)),
        }
    }
    // clap would print an empty line for it.
    if matches!(error.get(ContextKind::Suggested), Some(ContextValue::StyledStrs(others)) if others.is_empty())
    {
        error.remove(ContextKind::Suggested);
    }
    error
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::Cli;
    use super::*;

    #[test]
    fn only_words_that_look_alike_are_suggested() {
        let message = |words: &[&str]| {
            let words = std::iter::once(&"kcm").chain(words);
            without_far_ones(Cli::try_parse_from(words).unwrap_err()).to_string()
        };
        for (words, suggestion) in [
            (&["desribe"][..], Some("'describe'")),
            (&["umount"], Some("'unmount'")),
            (&["describe", "--format=tabel"], Some("'table'")),
            (&["ls"], None),
            (&["completions", "tcsh"], None),
        ] {
            let message = message(words);
            assert_eq!(message.contains("tip:"), suggestion.is_some(), "{message}");
            assert!(!message.contains("\n\n\n"), "{message}");
            assert!(suggestion.is_none_or(|suggestion| message.contains(suggestion)), "{message}");
            assert!(message.contains(words.last().unwrap().trim_start_matches("--format=")), "{message}");
        }
    }
}
