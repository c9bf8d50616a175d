//! Rights of users, and the objects that paths name.
//!
//! Owns parsing of paths and comparing of rules. Does not know users or objects.

use serde_json::Value;

/// The object or collection of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Named {
    pub group: String,
    pub namespace: Option<String>,
    pub resource: String,
    pub name: Option<String>,
    pub subresource: Option<String>,
}

impl Named {
    /// `/api/v1/…` and `/apis/<group>/<version>/…`, without the query.
    pub fn parse(path: &str) -> Option<Self> {
        let mut words = path.split('/').filter(|word| !word.is_empty()).peekable();
        let group = match words.next()? {
            "api" => String::new(),
            "apis" => words.next()?.to_owned(),
            _ => return None,
        };
        words.next()?;
        let mut namespace = None;
        let mut resource = words.next()?.to_owned();
        if resource == "namespaces" && words.clone().count() >= 2 {
            namespace = words.next().map(String::from);
            resource = words.next()?.to_owned();
        }
        let name = words.next().map(String::from);
        let subresource = words.next().map(String::from);
        Some(Self { group, namespace, resource, name, subresource })
    }

    /// Returns the form of rules: `nodes/status`.
    pub fn with_subresource(&self) -> String {
        match &self.subresource {
            Some(sub) => format!("{}/{sub}", self.resource),
            None => self.resource.clone(),
        }
    }

    /// Returns the form of messages: `nodereports.kcm.intel.com`.
    pub fn qualified(&self) -> String {
        match self.group.as_str() {
            "" => self.resource.clone(),
            group => format!("{}.{group}", self.resource),
        }
    }
}

/// A right that a request needs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    pub verb: &'static str,
    pub group: String,
    /// With its subresource.
    pub resource: String,
}

/// The rights of a user.
#[derive(Clone, Debug)]
pub enum Rights {
    All,
    None,
    /// The rules of a ClusterRole.
    Rules(Vec<Value>),
}

impl Rights {
    pub fn allow(&self, wanted: &Wanted) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Rules(rules) => rules.iter().any(|rule| allows(rule, wanted)),
        }
    }
}

pub fn allows(rule: &Value, wanted: &Wanted) -> bool {
    let has = |field: &str, value: &str| {
        rule[field].as_array().is_some_and(|all| all.iter().any(|item| item == value || item == "*"))
    };
    has("apiGroups", &wanted.group) && has("resources", &wanted.resource) && has("verbs", wanted.verb)
}
