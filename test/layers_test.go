// The architecture, as a test.

package test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// layers says which of our packages each of our packages may import. The test
// below fails on any other import, so this table is the architecture
// (docs/design.md, section 2).
var layers = map[string][]string{
	"blksnap":              {"blksnap/control"},
	"blksnap/control":      {"blksnap/cbt", "blksnap/cow", "blksnap/fusefs", "blksnap/intercept", "blksnap/store"},
	"blksnap/fusefs":       {"blksnap/fusefs/qcow2"},
	"blksnap/fusefs/qcow2": nil,
	"blksnap/intercept":    nil,
	"blksnap/cow":          {"blksnap/cbt", "blksnap/store"},
	"blksnap/cbt":          nil,
	"blksnap/store":        nil,
	"blksnap/test":         nil,
	"blksnap/test/bench":   nil,

	"blksnap/test/vm/reconnect": nil,
}

// sharedByTests may be imported by the tests of every package.
const sharedByTests = "blksnap/test"

// goNBD is imported for the constants and wire structures of the protocol
// alone: its client and its server are not fit to use (docs/measurements.md).
const goNBD = "github.com/pojntfx/go-nbd/"

var fitOfGoNBD = []string{goNBD + "pkg/protocol", goNBD + "pkg/ioctl"}

func TestLayers(t *testing.T) {
	for pkg, imports := range importsOf(t, "{{join .Imports \" \"}}") {
		allowed, known := layers[pkg]
		if !known {
			t.Errorf("%s is not in the table of layers", pkg)
		}
		checkImports(t, pkg, imports, allowed)
	}
	for pkg, imports := range importsOf(t, "{{join .TestImports \" \"}} {{join .XTestImports \" \"}}") {
		checkImports(t, "a test of "+pkg, imports, append([]string{pkg, sharedByTests}, layers[pkg]...))
	}
}

// checkImports reports the imports of importer that are ours and not allowed,
// and those of go-nbd that nobody may use.
func checkImports(t *testing.T, importer string, imports, allowed []string) {
	t.Helper()
	for _, imported := range imports {
		ours := imported == "blksnap" || strings.HasPrefix(imported, "blksnap/")
		if ours && !slices.Contains(allowed, imported) {
			t.Errorf("%s must not import %s", importer, imported)
		}
		if strings.HasPrefix(imported, goNBD) && !slices.Contains(fitOfGoNBD, imported) {
			t.Errorf("%s must not import %s", importer, imported)
		}
	}
}

// importsOf returns what each of our packages imports, as the template says.
func importsOf(t *testing.T, template string) map[string][]string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-f", "{{.ImportPath}} "+template, "./...")
	cmd.Dir = ".."
	var problems strings.Builder
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, problems.String())
	}

	imports := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		imports[words[0]] = words[1:]
	}
	return imports
}
