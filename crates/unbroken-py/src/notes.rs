//! What a leaf says of a tensor beside what it is.
//!
//! Touches: nothing.

use unbroken::Value;

/// What is noted of a tensor beside what it is.
pub(crate) enum Notes<'a> {
    Usual {
        class: Option<&'a str>,
        requires_grad: Option<bool>,
    },
    /// Sorted by name.
    These(Vec<(String, Value)>),
}

const CLASS: &str = "class";
pub(crate) const REQUIRES_GRAD: &str = "requires_grad";

impl Notes<'_> {
    pub(crate) const NOTHING: Notes<'static> = Notes::Usual {
        class: None,
        requires_grad: None,
    };

    /// Whether they are these attributes.
    pub(crate) fn are(&self, attrs: &[(String, Value)]) -> bool {
        match self {
            Notes::These(those) => those == attrs,
            Notes::Usual { class, requires_grad } => {
                let mut left = attrs.iter();
                let mut has = |noted: bool, name: &str, is_it: &dyn Fn(&Value) -> bool| {
                    !noted
                        || left
                            .next()
                            .is_some_and(|(other, value)| other == name && is_it(value))
                };
                let same_class = |value: &Value| matches!(value, Value::Str(text) if Some(&**text) == *class);
                let same_flag =
                    |value: &Value| matches!(value, Value::Bool(flag) if Some(*flag) == *requires_grad);
                has(class.is_some(), CLASS, &same_class)
                    && has(requires_grad.is_some(), REQUIRES_GRAD, &same_flag)
                    && left.next().is_none()
            }
        }
    }

    pub(crate) fn into_attrs(self) -> Vec<(String, Value)> {
        match self {
            Notes::These(attrs) => attrs,
            Notes::Usual { class, requires_grad } => {
                let class = class.map(|class| (CLASS.to_owned(), Value::Str(class.to_owned())));
                let requires_grad = requires_grad.map(|flag| (REQUIRES_GRAD.to_owned(), Value::Bool(flag)));
                class.into_iter().chain(requires_grad).collect()
            }
        }
    }
}
