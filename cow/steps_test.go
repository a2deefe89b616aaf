package cow

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// stepsMet are the kinds of steps that change what a killed process leaves, and which
// scenario kills the process at them. A kind that is not here, or that its scenario
// does not meet any more, fails the tests.
var stepsMet = map[string][]string{
	"space for all": {
		"prepare a record", "make a layer", "enter a layer", "make an overlay", "freeze a change map", "make a snapshot live",
		"commit a layer", "let a snapshot die", "release a frozen map", "free a record", "publish a word", "publish a hole",
		"publish a word of an overlay", "zero a chunk of an overlay", "fold a word into the older layer",
		"take a word from the newer layer", "forget a table", "forget an empty table", "note a fault",
		"take a word from the head", "take blocks from a word of the head",
	},
	"snapshots are lost": {
		"note a fault", "publish a word", "forget a table", "spend a layer", "cut a spent layer",
		"take a spent layer from the register", "remove a spent layer",
	},
	"a rollback":         {"note a rollback", "note a tear", "write back", "take back the note of a tear"},
	"a generation":       {"note a reason", "begin a generation"},
	"a resize":           {"note a new size"},
	"a cut by us":        {"note a cut", "cut an origin", "note a new size"},
	"a device in memory": {"distrust a device", "trust a device"},
}

// met collects the kinds of steps of a scenario.
type met struct {
	mu    sync.Mutex
	kinds map[string]bool
}

func (m *met) add(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kinds == nil {
		m.kinds = make(map[string]bool)
	}
	m.kinds[what] = true
}

// check fails the test unless the scenario has met its steps.
func (m *met) check(t *testing.T, scenario string) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	t.Logf("%s meets %q", scenario, slices.Sorted(maps.Keys(m.kinds)))
	for _, what := range stepsMet[scenario] {
		if !m.kinds[what] {
			t.Errorf("%s does not meet the step %q any more", scenario, what)
		}
	}
}

// TestEveryStepIsMet compares the table with the steps that the engine has.
func TestEveryStepIsMet(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[string]bool)
	for _, kinds := range stepsMet {
		for _, k := range kinds {
			known[k] = true
		}
	}
	step := regexp.MustCompile(`\.did\(([^)]*)\)`)
	found := make(map[string]bool)
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range step.FindAllStringSubmatch(string(text), -1) {
			kind := strings.Trim(m[1], `"`)
			found[kind] = true
			if !known[kind] {
				t.Errorf("%s: no scenario kills the process at the step %s", path, m[1])
			}
		}
	}
	for k := range known {
		if !found[k] {
			t.Errorf("the engine has no step %q any more", k)
		}
	}
}
