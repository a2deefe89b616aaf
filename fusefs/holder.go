// Telling whose tree a mount is, by who has its connection to the kernel open.

package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// mayServe says whether a process may have the connection open that the mount with a device
// number has. Where that cannot be looked at, it may; and where the kernel does not tell
// which connection a file is, as older ones do not, who has any may.
func mayServe(pid int, dev string) bool {
	_, minor, _ := strings.Cut(dev, ":")
	proc := fmt.Sprintf("/proc/%d/task", pid)
	threads, err := os.ReadDir(proc)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	for _, t := range threads {
		dir := filepath.Join(proc, t.Name())
		files, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil || len(files) == 0 {
			if !isDead(dir) {
				return true
			}
			continue
		}
		for _, f := range files {
			if name, err := os.Readlink(filepath.Join(dir, "fd", f.Name())); err != nil || name != "/dev/fuse" {
				continue
			}
			info, err := os.ReadFile(filepath.Join(dir, "fdinfo", f.Name()))
			if which, ok := connection(info); err != nil || !ok || which == minor {
				return true
			}
		}
	}
	return false
}

// isDead says whether a thread, by its directory in /proc, has no files any more. One that
// is just closing them shows none, and may have them for as long as one holds it up.
func isDead(dir string) bool {
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return !errors.Is(err, fs.ErrPermission)
	}
	for line := range bytes.Lines(status) {
		if state, ok := bytes.CutPrefix(line, []byte("State:\t")); ok {
			return state[0] == 'Z' || state[0] == 'X'
		}
	}
	return false
}

// connection is the number of a connection that the text in /proc about an open file tells.
func connection(info []byte) (number string, ok bool) {
	for line := range bytes.Lines(info) {
		if key, value, _ := strings.Cut(string(line), ":"); key == "fuse_connection" {
			return strings.TrimSpace(value), true
		}
	}
	return "", false
}
