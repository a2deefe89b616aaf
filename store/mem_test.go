package store

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMemLimits(t *testing.T) {
	total, err := memInfo("MemTotal")
	if err != nil {
		t.Fatal(err)
	}
	part := openMem(t, 0)
	defer part.Close()
	if got := part.Traits().Limit; got%SlotSize != 0 || got > total/4 || got < SlotSize {
		t.Errorf("default limit\n got %d\nwant whole slots, at most a quarter of %d", got, total)
	}
	for _, limit := range []int64{-1, 1, SlotSize - 1, 1 << 62} {
		if part, err := OpenMem(limit); err == nil {
			part.Close()
			t.Errorf("OpenMem(%d): no error", limit)
		}
	}
	if avail, err := part.Avail(); err != nil || avail <= 0 || avail > total {
		t.Errorf("Avail\n got %d, %v\nwant some of %d", avail, err, total)
	}
}

func TestCgroupLimit(t *testing.T) {
	root := t.TempDir()
	for dir, max := range map[string]string{"a": "max", "a/b": "5000", "a/b/c": "70000", "d": "70000", "d/e": "6000"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, dir, "memory.max"), []byte(max+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name, groups string
		want         int64
	}{
		{"no limit", "0::/a\n", 100_000},
		{"its own", "0::/a/b\n", 5000},
		{"less than that of a group above", "0::/d/e\n", 6000},
		{"of a group above", "1:cpu:/x\n0::/a/b/c\n", 5000},
		{"the root", "0::/\n", 100_000},
		{"gone", "0::/a/b/gone (deleted)\n", 5000},
		{"version 1 alone", "4:memory:/a/b\n", 100_000},
		{"nothing", "", 100_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			self := filepath.Join(t.TempDir(), "cgroup")
			if err := os.WriteFile(self, []byte(tc.groups), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := cgroupLimit(self, root, 100_000); got != tc.want {
				t.Errorf("cgroupLimit of %q\n got %d\nwant %d", tc.groups, got, tc.want)
			}
		})
	}
	if got := cgroupLimit(filepath.Join(root, "none"), root, 7); got != 7 {
		t.Errorf("cgroupLimit without a list of groups\n got %d\nwant 7", got)
	}
}

// TestMemWithFewAddresses: where addresses are short, as on a machine that never
// overcommits, there are fewer slots, but never fewer than the limit fills.
func TestMemWithFewAddresses(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_AS, &old); err != nil {
		t.Fatal(err)
	}
	const limit = 256 << 20
	room := old
	room.Cur = uint64(mapped(t)) + 2<<30
	if err := unix.Setrlimit(unix.RLIMIT_AS, &room); err != nil {
		t.Fatal(err)
	}
	part, err := OpenMem(limit)
	none, err2 := OpenMem(8 << 30)
	if err := unix.Setrlimit(unix.RLIMIT_AS, &old); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatalf("OpenMem with room for a few addresses: %v", err)
	}
	defer part.Close()
	if got := part.Traits().Slots; got < limit/SlotSize || got >= limit/BlockSize {
		t.Errorf("slots\n got %d\nwant %d at least, and less than %d", got, limit/SlotSize, limit/BlockSize)
	}
	if err2 == nil {
		none.Close()
		t.Errorf("OpenMem of more than there are addresses: no error")
	}
}
