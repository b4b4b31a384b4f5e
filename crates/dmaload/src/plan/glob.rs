//! Patterns for tensor names: `model.layers.{0..3}.*`.

use std::fmt;

/// A pattern: `*` matches any text, `?` any character, `{a,b}` either alternative, and `{0..3}` a
/// number in that range, both ends included (`{00..12}` has leading zeros). A name that is equal
/// to the pattern's text always matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern {
    source: String,
    alternatives: Vec<String>,
}

/// Maximum number of patterns to which the braces of one pattern may expand.
const ALTERNATIVES_LIMIT: usize = 4096;
const LENGTH_LIMIT_BYTES: usize = 4096;

impl Pattern {
    /// Parses a pattern and expands its braces.
    ///
    /// # Errors
    /// The reason why the pattern is invalid.
    pub(crate) fn new(source: &str) -> Result<Self, String> {
        if source.len() > LENGTH_LIMIT_BYTES {
            return Err(format!("invalid pattern: {} bytes, more than the limit of {LENGTH_LIMIT_BYTES}", source.len()));
        }
        let mut alternatives = Vec::new();
        expand(String::new(), source, &mut alternatives).map_err(|why| format!("invalid pattern {source:?}: {why}"))?;
        Ok(Pattern { source: source.to_owned(), alternatives })
    }

    /// Creates a pattern that matches only this name, whatever characters it contains.
    pub(crate) fn literal(name: &str) -> Self {
        Pattern { source: name.to_owned(), alternatives: Vec::new() }
    }

    /// Returns whether the pattern can match names that it does not spell out.
    pub(crate) fn is_wild(&self) -> bool {
        self.alternatives.iter().any(|pattern| pattern.contains(['*', '?']))
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        self.source == name || self.alternatives.iter().any(|pattern| is_match(pattern, name))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

/// Expands the braces in `rest`, and appends each expansion, prefixed with `before`, to `into`.
fn expand(before: String, rest: &str, into: &mut Vec<String>) -> Result<(), String> {
    let Some((literal, braces)) = rest.split_once('{') else {
        if into.len() == ALTERNATIVES_LIMIT {
            return Err(format!("it expands to more than {ALTERNATIVES_LIMIT} patterns"));
        }
        into.push(before + rest);
        return Ok(());
    };
    let (choices, after) = choices(braces)?;
    for choice in choices {
        // A choice may itself contain braces.
        let mut begun = Vec::new();
        expand(format!("{before}{literal}"), &choice, &mut begun)?;
        begun.into_iter().try_for_each(|begun| expand(begun, after, into))?;
    }
    Ok(())
}

/// Splits the text after an opening brace into the choices inside the braces and what follows the
/// closing brace. A range such as `0..3` becomes one choice for each number.
fn choices(text: &str) -> Result<(Vec<String>, &str), String> {
    let (mut depth, mut start, mut choices) = (0_u32, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            ',' if depth == 0 => {
                choices.push(text[start..at].to_owned());
                start = at + 1;
            }
            '}' if depth == 0 => {
                choices.push(text[start..at].to_owned());
                let range = match choices.as_slice() {
                    [only] => numbers(only).transpose()?,
                    _ => None,
                };
                return Ok((range.unwrap_or(choices), &text[at + 1..]));
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    Err("unclosed {".to_owned())
}

/// Expands a range such as `0..3` into its numbers. Returns `None` for anything else.
fn numbers(text: &str) -> Option<Result<Vec<String>, String>> {
    let (first, last) = text.split_once("..")?;
    let (from, to) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
    if from > to {
        return Some(Err(format!("the range {{{text}}} is reversed")));
    }
    if to - from >= ALTERNATIVES_LIMIT as u64 {
        return Some(Err(format!("it expands to more than {ALTERNATIVES_LIMIT} patterns")));
    }
    let width = if first.starts_with('0') { first.len() } else { 0 };
    Some(Ok((from..=to).map(|number| format!("{number:0width$}")).collect()))
}

/// Returns whether a name matches a pattern without braces. After a mismatch, only the text that
/// the last star matches is extended, so the time is at most proportional to the product of the
/// lengths.
fn is_match(pattern: &str, name: &str) -> bool {
    let (mut pattern, mut name) = (pattern.chars(), name.chars());
    // The pattern after the last star, and the part of the name that the star does not match.
    let mut star = None;
    loop {
        let rest = name.clone();
        match (pattern.next(), name.next()) {
            (None, None) => return true,
            (Some('*'), _) => {
                star = Some((pattern.clone(), rest.clone()));
                name = rest;
            }
            (Some(wanted), Some(found)) if wanted == '?' || wanted == found => {}
            _ => {
                let Some((after, from)) = &mut star else { return false };
                if from.next().is_none() {
                    return false;
                }
                (pattern, name) = (after.clone(), from.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, names: &[&str]) -> Vec<bool> {
        let pattern = Pattern::new(pattern).unwrap();
        names.iter().map(|name| pattern.matches(name)).collect()
    }

    #[test]
    fn stars_question_marks_and_braces_match() {
        assert_eq!(
            matches("model.layers.{0..3}.*", &["model.layers.0.q", "model.layers.3.", "model.layers.4.q"]),
            [true, true, false]
        );
        assert_eq!(matches("*.weight", &["a.weight", ".weight", "a.weight.b", "a.weight.weight"]), [true, true, false, true]);
        assert_eq!(matches("a?c", &["abc", "aäc", "ac", "abbc"]), [true, true, false, false]);
        assert_eq!(matches("{q,k,v{1..2}}_proj", &["q_proj", "v2_proj", "v_proj"]), [true, true, false]);
        assert_eq!(matches("{08..11}", &["08", "8", "11"]), [true, false, true]);
        assert_eq!(matches("{a}", &["a", "{a}", "b"]), [true, true, false]);
        assert_eq!(matches("", &["", "a"]), [true, false]);
        assert_eq!(matches("*a*b*", &["xxaxxbxx", "ba", "ab"]), [true, false, true]);
    }

    #[test]
    fn invalid_patterns_are_reported() {
        for (pattern, expected) in [
            ("a{b", "unclosed {"),
            ("{3..1}", "is reversed"),
            ("{0..9999}", "more than 4096"),
            ("{1..99}{1..99}", "more than 4096"),
        ] {
            let error = Pattern::new(pattern).unwrap_err();
            assert!(error.contains(expected) && error.contains(pattern), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn star_matches_any_text_and_no_pattern_panics(text in r"(\*|\?|\{|\}|,|\.\.|[0-9]{1,3}|[a-c]|ä){0,12}", name in "[a-cä]{0,8}") {
            if let Ok(pattern) = Pattern::new(&text) {
                assert!(pattern.matches(&text));
                let _ = pattern.matches(&name);
            }
            let at = name.char_indices().map(|(at, _)| at).nth(name.chars().count() / 2).unwrap_or(0);
            let (start, end) = name.split_at(at);
            assert!(Pattern::new(&format!("{start}*{end}")).unwrap().matches(&name));
        }
    }
}
