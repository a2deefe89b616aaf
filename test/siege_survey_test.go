// What must be true of a daemon that was killed and started again.

package test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// survey checks all that the daemon shows against what it was told before it was
// killed, and takes over what had not been answered.
func (s *siege) survey() {
	s.t.Helper()
	s.surveyDevices()
	s.surveySnapshots()
	s.surveyChanges()
	s.surveyStore()
}

func (s *siege) get(path string, out any) {
	s.t.Helper()
	if err := s.d.call("GET", path, nil, out); err != nil {
		s.t.Fatalf("get %s: %v", path, err)
	}
}

// surveyDevices checks which devices there are, and what they hold.
func (s *siege) surveyDevices() {
	s.t.Helper()
	var devices []deviceFacts
	eventually(s.t, "rollbacks go on and end", func() bool {
		devices = nil
		s.get("/devices", &devices)
		return !slices.ContainsFunc(devices, deviceFacts.isRollingBack)
	})
	found := make(map[string]deviceFacts)
	for _, f := range devices {
		found[f.Name] = f
	}
	if _, there := found[extraName]; s.extra != unknown && there != (s.extra == present) {
		s.t.Errorf("device %s is there: %v, want %v", extraName, there, !there)
	} else if s.extra = absent; there {
		s.extra = present
	}
	delete(found, extraName)
	if len(found) != len(s.devices) {
		s.t.Fatalf("devices: got %+v, want vda and vdb", devices)
	}
	for name, k := range s.devices {
		if err := s.surveyDevice(k, found[name]); err != nil {
			s.t.Error(err)
		}
	}
}

func (s *siege) surveyDevice(k *target, f deviceFacts) error {
	k.epoch++
	if k.resize != nil {
		if f.Size != k.resize[0] && f.Size != k.resize[1] {
			return fmt.Errorf("%s has %d bytes after a resize from %d to %d", k.name, f.Size, k.resize[0], k.resize[1])
		}
		k.resized(f.Size)
		k.resize = nil
	}
	if f.State != "ok" || f.Size != int64(len(k.now)) {
		return fmt.Errorf("%s has %d bytes and the state %q, want %d and ok", k.name, f.Size, f.State, len(k.now))
	}
	content, err := s.readExport(k.name, f.Size)
	if err == nil {
		err = k.settle(content)
	}
	if err != nil {
		return fmt.Errorf("live device: %w", err)
	}
	if f.CBT.Generation == k.generation {
		k.resetting, k.grown = false, false
		return nil
	}
	if !k.resetting && !k.grown {
		return fmt.Errorf("%s has begun a new generation", k.name)
	}
	s.count("generation ended with the process")
	k.foreign = k.grown
	k.grown = false
	return k.renew(f.CBT)
}

// readExport is all that an export holds.
func (s *siege) readExport(export string, size int64) ([]byte, error) {
	conn, err := (&life{siege: s}).connect(export)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	p := make([]byte, size)
	for off := int64(0); off < size; off += miB {
		if err := conn.readAt(p[off:min(off+miB, size)], off); err != nil {
			return nil, fmt.Errorf("read export %s at %d: %w", export, off, err)
		}
	}
	return p, nil
}

// surveySnapshots checks which snapshots there are, and all bytes of them.
func (s *siege) surveySnapshots() {
	s.t.Helper()
	var snapshots []snapshotFacts
	s.get("/snapshots", &snapshots)
	for _, sn := range slices.Clone(s.snapshots) {
		i := slices.IndexFunc(snapshots, func(f snapshotFacts) bool { return f.Name == sn.name })
		if i < 0 {
			if sn.state == present && !sn.mayBeGone() {
				s.t.Errorf("snapshot %s is gone", sn.name)
			}
			s.endMoments(sn)
			s.forget(sn)
			continue
		}
		err := s.surveySnapshot(sn, snapshots[i])
		if err != nil && !sn.mayBeGone() {
			s.t.Error(err)
		}
		snapshots = slices.Delete(snapshots, i, i+1)
	}
	if len(snapshots) > 0 {
		s.t.Errorf("there are snapshots of which nobody knows: %+v", snapshots)
	}
}

func (s *siege) surveySnapshot(sn *taken, f snapshotFacts) error {
	if sn.created.IsZero() {
		s.endMoments(sn)
		if err := s.learn(sn, f); err != nil {
			return err
		}
		s.count("taken by a daemon that was killed meanwhile")
	}
	sn.state = present
	if sn.lost || f.State != "ok" {
		return s.surveyLost(sn, f.State)
	}
	if !f.Created.Equal(sn.created) || f.Writable != sn.writable || (f.MaxStore != 0) != sn.limited || (f.Expires != nil) != !sn.expires.IsZero() {
		return fmt.Errorf("snapshot %s is now %+v, was %+v", sn.name, f, sn)
	}
	for _, i := range f.Images {
		if want := sn.images[i.Device].number; i.CBT.Number != want {
			return fmt.Errorf("%s@%s has number %d, want %d", i.Device, sn.name, i.CBT.Number, want)
		}
	}
	read := func(device string) ([]byte, error) { return os.ReadFile(s.d.snapshot(sn.name, device+".img")) }
	if s.rng.IntN(2) == 0 {
		read = func(device string) ([]byte, error) {
			return s.readExport(device+"@"+sn.name, f.Images[slices.IndexFunc(f.Images, func(i imageFacts) bool { return i.Device == device })].Size)
		}
	}
	if !s.isNoted(sn) {
		return s.note(sn, read)
	}
	for name, i := range sn.images {
		content, err := read(name)
		if err == nil {
			err = i.settle(content)
		}
		if err != nil {
			return fmt.Errorf("image of %s: %w", sn.name, err)
		}
	}
	s.count("verified")
	return nil
}

// surveyLost checks a snapshot that has overflowed: it may have, and says so to
// whoever reads it.
func (s *siege) surveyLost(sn *taken, state string) error {
	if (s.devices["vdb"].foreign || sn.lost) && sn.images["vdb"] != nil && strings.HasPrefix(state, "failed") {
		sn.lost = true
		return nil
	}
	if state != "overflowed" || !s.tight && !sn.limited {
		return fmt.Errorf("snapshot %s is %q", sn.name, state)
	}
	if !sn.lost {
		sn.lost = true
		s.count("overflowed")
	}
	failed := 0
	for name := range sn.images {
		f, err := os.Open(s.d.snapshot(sn.name, name+".img"))
		if err == nil {
			_, err = io.Copy(io.Discard, f)
			f.Close()
		}
		if errors.Is(err, syscall.EIO) {
			failed++
		} else if err != nil {
			return fmt.Errorf("read an image of %s, which has overflowed: %w", sn.name, err)
		}
	}
	if failed == 0 {
		return fmt.Errorf("snapshot %s has overflowed, and its images can be read", sn.name)
	}
	return nil
}

// measure says what the snapstore holds, for whom.
func (s *siege) measure() (use string) {
	var parts []partFacts
	s.get("/store", &parts)
	for _, p := range parts {
		use += fmt.Sprintf("%s uses %d of %d\n", p.Part, p.Used, p.Size)
	}
	var snapshots []snapshotFacts
	s.get("/snapshots", &snapshots)
	for _, sn := range snapshots {
		for _, i := range sn.Images {
			if i.State != "ok" {
				continue // it holds nothing, and nobody may know of it any more
			}
			use += fmt.Sprintf("%s@%s holds %d\n", i.Device, sn.Name, i.Holds)
		}
	}
	return use
}

// settleTime is how long the daemon may go on sorting what it has found.
const settleTime = 5 * time.Second

// surveyStore checks which parts the snapstore has, and that df says the same.
func (s *siege) surveyStore() {
	s.t.Helper()
	var parts []partFacts
	s.get("/store", &parts)
	if s.use != "" {
		s.count("measured")
		got := s.measure()
		for until := time.Now().Add(settleTime); got != s.use && time.Now().Before(until); got = s.measure() {
			time.Sleep(5 * time.Millisecond)
		}
		if got != s.use {
			s.t.Errorf("the snapstore of a daemon at rest\n got %s\nwant %s", got, s.use)
		}
		s.use = ""
	}
	var size int64
	found := make(map[string]bool)
	for _, p := range parts {
		path := strings.TrimPrefix(p.Part, "file:")
		found[path] = true
		size += p.Size
		if s.parts[path] == absent || p.State != "ok" || p.Used < 0 || p.Free < 0 || p.Used+p.Free > p.Size {
			s.t.Errorf("part of the snapstore: %+v", p)
		}
	}
	for path, there := range s.parts {
		if there == present && !found[path] {
			s.t.Errorf("%s is not a part of the snapstore any more", path)
		}
		s.parts[path] = absent
		if found[path] {
			s.parts[path] = present
		} else if there == unknown {
			delete(s.parts, path)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.d.mount, &fs); err != nil || int64(fs.Blocks)*fs.Bsize != size || fs.Bfree > fs.Blocks {
		s.t.Errorf("statfs: %+v, %v; the parts have %d bytes", fs, err, size)
	}
}
