// The set file: which devices and parts of the snapstore there are, for a daemon
// that starts after this one was killed, stopped or upgraded. It is in the run
// directory and goes with the machine's next start; what is set up for good is on
// the command line or in the configuration file.
//
// It is JSON, so that people can read it; nobody is to change it.
//
//	version  1
//	sum      CRC-32C of the whole file in hexadecimal, with zeroes for itself
//	boot     boot id
//	devices  name, origin, tracking block and store wait as device add takes them, and
//	         whether it was added at run time
//	parts    number, spec, UUID, and whether it was added at run time

package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/uuid"

	"blksnap/store"
)

// members is the content of the set file.
type members struct {
	Version int            `json:"version"`
	Sum     string         `json:"sum"`
	Boot    string         `json:"boot"`
	Devices []memberDevice `json:"devices"`
	Parts   []memberPart   `json:"parts"` // also those that are gone

	open map[uint8]bool // numbers of the parts that are open
	news bool           // a part has got a number since this was read
}

// memberDevice is a device. One that was added at run time is back after a
// restart; another is if it is asked for again.
type memberDevice struct {
	DeviceRequest
	Added bool `json:"added"`
}

// memberPart is a part of the snapstore and the number that slots name it by.
type memberPart struct {
	No    uint8     `json:"no"`
	Spec  string    `json:"spec"`
	ID    uuid.UUID `json:"id"`
	Added bool      `json:"added"`
}

// maxMembers bounds what is read of the set file.
const maxMembers = 16 << 20

const (
	membersVersion = 1
	noSum          = "00000000"
)

// sumField is where the checksum is in the file, with the value sum.
func sumField(sum string) []byte { return fmt.Appendf(nil, `"sum": "%s"`, sum) }

// sumOf is the checksum of b, which has zeroes for it.
func sumOf(b []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// seal puts the checksum in.
func seal(b []byte) []byte { return bytes.Replace(b, sumField(noSum), sumField(sumOf(b)), 1) }

// checkSeal says whether b, which m was read from, is as it was written.
func (m members) checkSeal(b []byte) error {
	if m.Version != membersVersion {
		return fmt.Errorf("version %d, this is %d: another version of blksnap wrote it", m.Version, membersVersion)
	}
	if sumOf(bytes.Replace(b, sumField(m.Sum), sumField(noSum), 1)) != m.Sum {
		return errors.New("it is damaged: checksum")
	}
	return nil
}

func membersPath(run string) string { return filepath.Join(run, "set.json") }

// readMembers returns what a predecessor in this boot left in the run directory.
// The error matches fs.ErrNotExist where it left nothing.
func readMembers(run, boot string) (members, error) {
	path := membersPath(run)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO is empty then
	if err != nil {
		return members{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMembers))
	if err != nil {
		return members{}, err
	}
	var m members
	if err := json.Unmarshal(b, &m); err != nil {
		return members{}, fmt.Errorf("read %s: %w", path, err)
	}
	if err := m.checkSeal(b); err != nil {
		return members{}, fmt.Errorf("read %s: %w", path, err)
	}
	if m.Boot != boot {
		return members{}, fmt.Errorf("read %s: it is of another boot: %w", path, fs.ErrNotExist)
	}
	numbers := make(map[uint8]bool)
	for _, p := range m.Parts {
		if p.No == 0 || numbers[p.No] {
			return members{}, fmt.Errorf("read %s: a part has the number %d", path, p.No)
		}
		numbers[p.No] = true
	}
	return m, nil
}

// write puts m in the place of what is there, at once.
func (m members) write(run string) error {
	m.Version, m.Sum = membersVersion, noSum
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	path := membersPath(run)
	if st, err := os.Lstat(path); err == nil && st.IsDir() { // over which nothing can be renamed
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(path + ".new"); err != nil { // whatever it is
		return err
	}
	if err := os.WriteFile(path+".new", seal(append(b, '\n')), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// addedDevices are the devices that were added at run time and are not asked for.
func (m members) addedDevices(asked []DeviceRequest) []DeviceRequest {
	var added []DeviceRequest
	for _, q := range m.Devices {
		taken := func(o DeviceRequest) bool { return o.Name == q.Name || o.Origin == q.Origin }
		if q.Added && !slices.ContainsFunc(asked, taken) {
			added = append(added, q.DeviceRequest)
		}
	}
	return added
}

// addedParts are the parts that were added at run time and are not asked for.
func (m members) addedParts(asked []store.Spec) []store.Spec {
	var added []store.Spec
	for _, p := range m.Parts {
		spec, err := store.ParseSpec(p.Spec)
		taken := func(o store.Spec) bool { return o.Path != "" && o.Path == spec.Path }
		if err == nil && p.Added && !slices.ContainsFunc(asked, taken) {
			added = append(added, spec)
		}
	}
	return added
}

// absent are the parts that hold something still, but were not opened.
func (m members) absent() (parts []memberPart) {
	for _, p := range m.Parts {
		if spec, err := store.ParseSpec(p.Spec); err == nil && spec.Path != "" && !m.open[p.No] {
			parts = append(parts, p)
		}
	}
	return parts
}

// claim gives a part that was just opened its number: the one that it had, else
// one that no part ever had. Slots of a part that is gone must not be looked for
// in another.
func (m *members) claim(part store.Part, added bool) (uint8, error) {
	t := part.Traits()
	now := memberPart{Spec: t.Spec.String(), ID: t.ID, Added: added}
	if m.open == nil {
		m.open = make(map[uint8]bool)
	}
	for i, p := range m.Parts {
		if !m.open[p.No] && place(p.Spec) == place(now.Spec) && p.ID == now.ID {
			now.No = p.No
			m.Parts[i], m.open[p.No] = now, true
			return p.No, nil
		}
	}
	for no := uint8(1); no != 0; no++ {
		if !slices.ContainsFunc(m.Parts, func(p memberPart) bool { return p.No == no }) {
			now.No = no
			m.Parts, m.open[no], m.news = append(m.Parts, now), true, true
			return no, nil
		}
	}
	return 0, errors.New("the snapstore has had 255 parts since the machine was started")
}

// place is a spec without its limit, which may change.
func place(text string) string {
	spec, err := store.ParseSpec(text)
	if err != nil {
		return text
	}
	spec.Limit = 0
	return spec.String()
}

// keepMembers writes the set file into the directory run now, and whenever
// something comes or goes.
func (d *Daemon) keepMembers(run string, m members) {
	d.mu.Lock()
	d.run, d.members = run, m
	d.mu.Unlock()
	d.noteMembers()
}

// noteMembers is writeMembers where devices came or went: that it cannot be written
// costs a successor what was added at run time.
func (d *Daemon) noteMembers() {
	if err := d.writeMembers(); err != nil {
		d.log.Warn("what was added at run time will not be back after a restart", "err", err)
	}
}

// writeMembers writes the set file.
func (d *Daemon) writeMembers() error {
	d.writing.Lock()
	defer d.writing.Unlock()
	d.mu.Lock()
	run, m := d.run, members{Boot: d.cat.Boot(), Parts: slices.Clone(d.members.Parts)}
	for _, dev := range d.devices {
		m.Devices = append(m.Devices, memberDevice{dev.request, dev.added})
	}
	d.mu.Unlock()
	if run == "" {
		return nil
	}
	slices.SortFunc(m.Devices, func(a, b memberDevice) int { return strings.Compare(a.Name, b.Name) })
	return m.write(run)
}
