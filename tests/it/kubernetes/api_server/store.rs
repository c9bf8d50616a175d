//! The objects, their versions and their changes.
//!
//! Owns the state of the server. Does not know requests.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// One change, for watches.
#[derive(Clone, Debug)]
struct Change {
    version: u64,
    kind: &'static str,
    path: String,
    object: Value,
}

/// All objects by path.
pub struct Store {
    version: u64,
    objects: BTreeMap<String, Value>,
    changes: Vec<Change>,
    /// Changes before this version are forgotten.
    pub oldest: u64,
}

impl Store {
    pub fn new() -> Self {
        Self { version: 100, objects: BTreeMap::new(), changes: Vec::new(), oldest: 0 }
    }

    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn get(&self, path: &str) -> Option<&Value> {
        self.objects.get(path)
    }

    /// Adds or replaces an object. Returns it with its new version.
    pub fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        let old = self.objects.get(path);
        let meta = &mut object["metadata"];
        meta["resourceVersion"] = self.version.to_string().into();
        if old.is_none() {
            meta["uid"] = format!("00000000-0000-4000-8000-{:012}", self.version).into();
            meta["creationTimestamp"] = "2026-11-23T20:57:18Z".into();
        }
        let kind = if old.is_none() { "ADDED" } else { "MODIFIED" };
        self.objects.insert(path.to_owned(), object.clone());
        self.note(kind, path, object.clone());
        object
    }

    /// Changes an object, if it exists.
    pub fn change(&mut self, path: &str, change: impl FnOnce(&mut Value)) {
        if let Some(mut object) = self.objects.get(path).cloned() {
            change(&mut object);
            self.put(path, object);
        }
    }

    /// Removes an object, and as the garbage collector of a cluster the objects of which it was the owner.
    pub fn remove(&mut self, path: &str) {
        let Some(object) = self.objects.remove(path) else { return };
        self.version += 1;
        let uid = object["metadata"]["uid"].clone();
        self.note("DELETED", path, object);
        let is_owned = |object: &Value| {
            let owners = object["metadata"]["ownerReferences"].as_array();
            owners.is_some_and(|owners| !owners.is_empty() && owners.iter().all(|owner| owner["uid"] == uid))
        };
        let owned = self.objects.iter().filter(|(_, object)| is_owned(object));
        let owned: Vec<String> = owned.map(|(path, _)| path.clone()).collect();
        owned.iter().for_each(|path| self.remove(path));
    }

    fn note(&mut self, kind: &'static str, path: &str, object: Value) {
        self.changes.push(Change { version: self.version, kind, path: path.to_owned(), object });
    }

    /// The objects of a collection.
    pub fn list(&self, collection: &str, selector: &Selector) -> Vec<Value> {
        let inside = |path: &str| is_inside(path, collection);
        let all = self.objects.iter().filter(|(path, _)| inside(path)).map(|(_, object)| object);
        all.filter(|object| selector.takes(object)).cloned().collect()
    }

    /// The first change after a version.
    fn after(&self, version: u64, collection: &str, selector: &Selector) -> Option<&Change> {
        let from = self.changes.partition_point(|change| change.version <= version);
        self.changes[from..]
            .iter()
            .find(|change| is_inside(&change.path, collection) && selector.takes(&change.object))
    }
}

fn is_inside(path: &str, collection: &str) -> bool {
    path.strip_prefix(collection).is_some_and(|rest| rest.starts_with('/') && !rest[1..].contains('/'))
}

/// `labelSelector` and `fieldSelector` with equality only.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    pub labels: Vec<(String, String)>,
    pub fields: Vec<(String, String)>,
}

impl Selector {
    pub fn takes(&self, object: &Value) -> bool {
        let label = |(name, value): &(String, String)| object["metadata"]["labels"][name] == *value;
        let field = |(name, value): &(String, String)| {
            object.pointer(&format!("/{}", name.replace('.', "/"))).is_some_and(|found| found == value)
        };
        self.labels.iter().all(label) && self.fields.iter().all(field)
    }
}

/// An open watch.
#[derive(Clone, Debug)]
pub struct Watch {
    pub collection: String,
    pub selector: Selector,
    pub version: u64,
    pub seconds: u64,
}

impl Watch {
    /// Returns the next event, if there is one.
    pub fn next(&mut self, store: &Store) -> Option<String> {
        let change = store.after(self.version, &self.collection, &self.selector)?;
        self.version = change.version;
        Some(json!({ "type": change.kind, "object": change.object }).to_string())
    }
}
