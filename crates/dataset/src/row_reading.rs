//! How the parts of a row are read: texts kept or only looked at, objects that are objects, lists that end.

use std::borrow::Cow;

use holdfast_domain::limits::MAX_MESSAGES_PER_ROW;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

use crate::row::Role;

/// The default of a field of any type; serde's own asks that the type has one.
pub(crate) fn none<T>() -> Option<T> {
    None
}

/// What can be kept of a text.
pub(crate) trait Text {
    fn is_empty(&self) -> bool;
}

/// A text, borrowed where it stands in the line without escapes. Derived code would copy an optional one always.
pub(crate) struct Kept<'a>(pub(crate) Cow<'a, str>);

impl Text for Kept<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Kept<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrow;
        impl<'de> Visitor<'de> for Borrow {
            type Value = Kept<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Kept(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Kept(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Borrow)
    }
}

/// Of a text, whether there is one: all that a check of a row's shape needs.
pub(crate) struct Seen(bool);

impl Text for Seen {
    fn is_empty(&self) -> bool {
        !self.0
    }
}

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Look(|text: &str| Self(!text.is_empty())))
    }
}

/// The role a message names, when there is such a role.
pub(crate) struct Word(pub(crate) Option<Role>);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Look(|word: &str| Self(Role::parse(word))))
    }
}

/// Makes something of a string without keeping it.
pub(crate) struct Look<F>(F);

impl<R, F: FnOnce(&str) -> R> Visitor<'_> for Look<F> {
    type Value = R;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<R, E> {
        Ok((self.0)(text))
    }
}

/// A struct that is written as a JSON object. Derived code would take an array of its fields as well.
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FromMap<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for FromMap<T> {
            type Value = T;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_map(FromMap(std::marker::PhantomData)).map(Self)
    }
}

/// Messages, as long as there are not too many of them to keep.
pub(crate) fn bounded<'de, D: Deserializer<'de>, M: Deserialize<'de>>(deserializer: D) -> Result<Option<Vec<M>>, D::Error> {
    struct Messages<M>(std::marker::PhantomData<M>);
    impl<'de, M: Deserialize<'de>> Visitor<'de> for Messages<M> {
        type Value = Option<Vec<M>>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {MAX_MESSAGES_PER_ROW} messages")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut messages = Vec::new();
            while let Some(message) = list.next_element()? {
                if messages.len() == MAX_MESSAGES_PER_ROW {
                    return Err(serde::de::Error::invalid_length(messages.len() + 1, &self));
                }
                messages.push(message);
            }
            Ok(Some(messages))
        }
    }
    deserializer.deserialize_any(Messages(std::marker::PhantomData))
}

/// An array of anything that serde_json can hold.
pub(crate) type Tools = Vec<Readable>;

/// JSON of which nothing is kept, but which has been read and not skipped.
pub(crate) struct Readable;

impl<'de> Deserialize<'de> for Readable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Readable;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Readable, E> {
                Ok(Readable)
            }
            fn visit_bool<E>(self, _: bool) -> Result<Readable, E> {
                Ok(Readable)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Readable, E> {
                Ok(Readable)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Readable, E> {
                Ok(Readable)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Readable, E> {
                Ok(Readable)
            }
            fn visit_str<E>(self, _: &str) -> Result<Readable, E> {
                Ok(Readable)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Readable, A::Error> {
                while list.next_element::<Readable>()?.is_some() {}
                Ok(Readable)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Readable, A::Error> {
                while map.next_entry::<Readable, Readable>()?.is_some() {}
                Ok(Readable)
            }
        }
        deserializer.deserialize_any(Any)
    }
}
