package control

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWarningOfTheState asks about a device whose change map cannot be written down.
func TestWarningOfTheState(t *testing.T) {
	state := t.TempDir()
	dir := filepath.Join(state, "devices", "vda")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/full", filepath.Join(dir, "map.new")); err != nil {
		t.Fatal(err)
	}
	d := newTestDaemonOver(t, state, "vda")
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		info, err := d.deviceInfo("vda")
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(info.CBT.Warning, "the change map cannot be written down: ") && info.State == "ok" {
			return
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("state %q, warning %q; want ok, and that the map cannot be written down", info.State, info.CBT.Warning)
		}
	}
}
