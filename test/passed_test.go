// blksnap started by its client, which passes it a socket.

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// An NBD client of libnbd starts the server itself, uses it and ends it. Nothing
// is left, and what was written is in the origin.
func TestClientsStartIt(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo", "nbdcopy")
	const size = 8 * miB
	dir := scratch(t)
	origin, tmp := makeOrigin(t, dir, "disk", size), filepath.Join(dir, "tmp")
	mkdir(t, tmp)
	before := filepath.Join(dir, "before")
	run(t, "cp", "--sparse=always", origin, before)
	content := make([]byte, size)
	Stamp(content, "disk", 0, 2)
	after := filepath.Join(dir, "after")
	write(t, after, content)

	copied := filepath.Join(dir, "copied")
	server := []string{"[", blksnapPath, "serve", "--mount", "none", origin, "]"}
	client := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "NOTIFY_SOCKET=")
		out := succeed(t, cmd)
		left, err := os.ReadDir(tmp)
		if err != nil || len(left) > 0 {
			t.Errorf("%s left %v in the temporary directory: %v", name, left, err)
		}
		return out
	}
	if got := client("nbdinfo", append([]string{"--size", "--"}, server...)...); got != "8388608" {
		t.Errorf("size\n got %s\nwant %d", got, int64(size))
	}
	if got := client("nbdinfo", append([]string{"--map", "--"}, server...)...); !strings.Contains(got, "4194304     4194304    3  hole,zero") {
		t.Errorf("map\n got %s\nwant a hole in the second half", got)
	}
	client("nbdcopy", append(append([]string{"--"}, server...), copied)...)
	run(t, "cmp", copied, before)
	client("nbdcopy", append([]string{"--flush", "--", after}, server...)...)
	run(t, "cmp", origin, after)
}
